//! Rules in tables of others: as few as can be, marked as ours, and nothing else of theirs touched.

use std::io;

use super::kernel::{CREATE, Nft, is_missing};
use super::wire::{self, Batch, FAMILY_INET, FAMILY_IPV4, Meta, Register, Rule};

/// A chain of another's table.
#[derive(Debug)]
pub(in crate::net) struct Chain {
    pub(in crate::net) table: String,
    pub(in crate::net) name: String,
}

/// What is attached to our rules: the text `smolvm` as a comment (NFTNL_UDATA_RULE_COMMENT), which
/// `nft` prints.
const MARK: &[u8] = b"\0\x07smolvm\0";

/// The hook through which forwarded packets go.
const FORWARD: u32 = 2;

/// Puts two rules at the head of an IPv4 chain that accept what comes in by devices whose names
/// begin so, and what leaves by them; `false` if there is no such chain. Idempotent.
///
/// They are made of what iptables makes its own of, so that it can list them: as
/// `-i smol+ -m comment --comment smolvm -j ACCEPT`, and the same with `-o`.
pub(in crate::net) fn accept_devices(
    table: &str,
    chain: &str,
    name_prefix: &str,
) -> io::Result<bool> {
    let mut nft = Nft::open()?;
    let settled = nft.settled(|nft, generation| {
        if !has_chain(nft, table, chain)? {
            return Ok(false);
        }
        let ours = ours(nft, table, chain)?;
        if ours.len() == 2 {
            return Ok(true);
        }
        let mut batch = Batch::new(Some(generation));
        remove(&mut batch, table, chain, &ours);
        for key in [Meta::OutputName, Meta::InputName] {
            let register = Register::first();
            let rule = Rule::new()
                .meta(key, register)
                .equals(register, name_prefix.as_bytes())
                .counter()
                .accept();
            batch.push("make a rule", (wire::NEW_RULE, CREATE), FAMILY_IPV4, |a| {
                a.text(1, table);
                a.text(2, chain);
                a.nest(4, |a| a.raw(rule.expressions()));
                a.bytes(7, MARK);
            });
        }
        nft.commit(batch)?;
        Ok(true)
    });
    // It may go between two looks.
    match settled {
        Err(e) if is_missing(&e) => Ok(false),
        other => other,
    }
}

/// Removes our rules from a chain.
pub(in crate::net) fn remove_ours(table: &str, chain: &str) -> io::Result<()> {
    let mut nft = Nft::open()?;
    nft.settled(|nft, generation| {
        let ours = ours(nft, table, chain)?;
        let mut batch = Batch::new(Some(generation));
        remove(&mut batch, table, chain, &ours);
        nft.commit(batch)
    })
}

/// Whether our rules are in a chain.
pub(in crate::net) fn has_ours(table: &str, chain: &str) -> io::Result<bool> {
    Ok(!ours(&mut Nft::open()?, table, chain)?.is_empty())
}

/// The chains that forwarded IPv4 packets go through and that drop by default.
pub(in crate::net) fn dropping_chains() -> io::Result<Vec<Chain>> {
    let mut nft = Nft::open()?;
    let mut all = Vec::new();
    for family in [FAMILY_IPV4, FAMILY_INET] {
        all.extend(
            nft.chains(family)?
                .into_iter()
                .filter(|chain| chain.hook == Some(FORWARD) && chain.drops)
                .map(|chain| Chain {
                    table: chain.table,
                    name: chain.name,
                }),
        );
    }
    Ok(all)
}

fn has_chain(nft: &mut Nft, table: &str, chain: &str) -> io::Result<bool> {
    let chains = nft.chains(FAMILY_IPV4)?;
    Ok(chains.iter().any(|c| c.table == table && c.name == chain))
}

/// The handles of our rules in a chain.
fn ours(nft: &mut Nft, table: &str, chain: &str) -> io::Result<Vec<u64>> {
    Ok(nft
        .rules(FAMILY_IPV4, table, Some(chain))?
        .into_iter()
        .filter(|rule| rule.chain == chain && rule.data == MARK)
        .map(|rule| rule.handle)
        .collect())
}

fn remove(batch: &mut Batch, table: &str, chain: &str, handles: &[u64]) {
    for handle in handles {
        batch.push("remove a rule", (wire::DELETE_RULE, 0), FAMILY_IPV4, |a| {
            a.text(1, table);
            a.text(2, chain);
            a.number64(3, *handle);
        });
    }
}
