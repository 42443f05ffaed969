//! Deciding about questions and answers. Pure.

use std::net::Ipv4Addr;
use std::time::Duration;

use domain::base::iana::{Class, Opcode, Rcode};
use domain::base::message_builder::HashCompressor;
use domain::base::name::ToName as _;
use domain::base::{Message, MessageBuilder, Name, ParsedName, Question, Record, Rtype};
use domain::rdata::AllRecordData;

use super::{DeniedLookup, DeniedReason, HOLD_MAX, HOLD_MIN, Rules};

/// What a guest that says nothing else takes by UDP, RFC 1035 section 4.2.1.
const PLAIN_BYTES: u16 = 512;

/// What we send and take by UDP at most: what passes unfragmented nearly everywhere
/// (<https://www.dnsflagday.net/2020/>).
pub(super) const UDP_BYTES: u16 = 1232;

/// The most records of an answer that are looked at. More are left out, as if they were not there.
const RECORDS_MAX: usize = 256;

/// What is to be done with what a guest sent.
#[derive(Debug)]
pub enum Judged {
    /// Ask a name server.
    Forward(Box<Lookup>),
    /// Send this back.
    Answer {
        /// The message.
        reply: Vec<u8>,
        /// What was denied by it, if anything.
        denied: Option<DeniedLookup>,
    },
    /// Nothing: it is no question, and answering could start a conversation of two servers.
    Ignore,
}

/// A question that the guest may ask.
#[derive(Debug)]
pub struct Lookup {
    /// The guest's message.
    asked: Message<Vec<u8>>,
    name: Name<Vec<u8>>,
    kind: Rtype,
    /// How long an answer the guest takes by UDP.
    udp_bytes: u16,
}

/// An answer to be given to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    /// The message for the guest, of any length.
    pub reply: Vec<u8>,
    /// Where the name leads, and how long a guest may be let go there.
    pub addresses: Vec<(Ipv4Addr, Duration)>,
    /// What was denied by the answer, if anything; there are no addresses then.
    pub denied: Option<DeniedLookup>,
}

/// Why a message is not the answer to a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unusable {
    /// It answers something else, or is forged or garbled. The right one may still come.
    Unrelated,
    /// It was cut short, and has to be asked for by TCP.
    Truncated,
}

/// Decides about a message of a guest.
#[must_use]
pub fn judge(message: &[u8], rules: &Rules) -> Judged {
    let Ok(asked) = Message::from_octets(message.to_vec()) else {
        return Judged::Ignore;
    };
    if asked.header().qr() {
        return Judged::Ignore;
    }
    let refuse = |rcode, denied| Judged::Answer {
        reply: empty(&asked, rcode),
        denied,
    };
    if asked.header().opcode() != Opcode::QUERY {
        return refuse(Rcode::NOTIMP, None);
    }
    let Ok(question) = asked.sole_question() else {
        return refuse(Rcode::FORMERR, None);
    };
    let name = question.qname().to_vec();
    let kind = question.qtype();
    // ANY, zone transfers, and other classes than the Internet's.
    let unusual = [Rtype::ANY, Rtype::AXFR, Rtype::IXFR].contains(&kind);
    if question.qclass() != Class::IN || unusual {
        return refuse(Rcode::NOTIMP, None);
    }
    if !rules.has(&name) {
        let denied = DeniedLookup {
            name: name.to_string(),
            reason: DeniedReason::Name,
        };
        return refuse(Rcode::REFUSED, Some(denied));
    }
    // Guests have no IPv6, and the hints of HTTPS records would lead around the addresses we know.
    if [Rtype::AAAA, Rtype::HTTPS, Rtype::SVCB].contains(&kind) {
        return refuse(Rcode::NOERROR, None);
    }
    let udp_bytes = asked.opt().map_or(PLAIN_BYTES, |opt| {
        opt.udp_payload_size().clamp(PLAIN_BYTES, UDP_BYTES)
    });
    Judged::Forward(Box::new(Lookup {
        asked,
        name,
        kind,
        udp_bytes,
    }))
}

/// A reply without records.
fn empty(asked: &Message<Vec<u8>>, rcode: Rcode) -> Vec<u8> {
    let mut reply = MessageBuilder::new_vec().start_error(asked, rcode);
    reply.header_mut().set_ra(true);
    reply.finish()
}

impl Lookup {
    /// The name that is asked for, without the dot at its end.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.to_string()
    }

    /// The question for a name server: our own words, nothing of the guest's but name and type.
    #[must_use]
    pub fn query(&self, id: u16) -> Vec<u8> {
        let mut query = MessageBuilder::new_vec();
        query.header_mut().set_id(id);
        query.header_mut().set_rd(true);
        let mut query = query.question();
        // A vector takes whatever is pushed.
        let _ = query.push(Question::new_in(&self.name, self.kind));
        let mut query = query.additional();
        let _ = query.opt(|opt| {
            opt.set_udp_payload_size(UDP_BYTES);
            Ok(())
        });
        query.finish()
    }

    /// Decides about what a name server answered to [`Lookup::query`] with the same `id`.
    ///
    /// # Errors
    ///
    /// [`Unusable`], in which case it has no effect.
    pub fn accept(&self, message: &[u8], id: u16, rules: &Rules) -> Result<Accepted, Unusable> {
        let answer = Message::from_slice(message).map_err(|_| Unusable::Unrelated)?;
        let header = answer.header();
        let question = answer.sole_question().map_err(|_| Unusable::Unrelated)?;
        let ours = header.qr()
            && header.id() == id
            && header.opcode() == Opcode::QUERY
            && question.qname().name_eq(&self.name)
            && question.qtype() == self.kind
            && question.qclass() == Class::IN;
        if !ours {
            return Err(Unusable::Unrelated);
        }
        if header.tc() {
            return Err(Unusable::Truncated);
        }
        let records = self.records(answer).ok_or(Unusable::Unrelated)?;
        let mut addresses = Vec::new();
        // The way from the name to its addresses, however the records are ordered.
        let mut way = vec![(self.name.clone(), HOLD_MAX)];
        let mut step = 0;
        while let Some((name, time)) = way.get(step).cloned() {
            for record in records
                .iter()
                .filter(|record| record.owner().name_eq(&name))
            {
                let time = time.min(record.ttl().into_duration());
                match record.data() {
                    AllRecordData::A(a) => {
                        addresses.push((a.addr(), time.clamp(HOLD_MIN, HOLD_MAX)));
                    }
                    AllRecordData::Cname(to) if way.len() < RECORDS_MAX => {
                        let to = to.cname().to_vec();
                        if way.iter().all(|(known, _)| !known.name_eq(&to)) {
                            way.push((to, time));
                        }
                    }
                    _ => {}
                }
            }
            step += 1;
        }
        // All of an answer or nothing: half of one would hide that somebody tried.
        let forbidden = addresses.iter().find(|(a, _)| !rules.may_lead_to(*a));
        if let Some((address, _)) = forbidden {
            return Ok(Accepted {
                reply: empty(&self.asked, Rcode::REFUSED),
                addresses: Vec::new(),
                denied: Some(DeniedLookup {
                    name: self.name(),
                    reason: DeniedReason::Address(*address),
                }),
            });
        }
        let reply = self
            .reply(&records, header.rcode(), &way)
            .ok_or(Unusable::Unrelated)?;
        Ok(Accepted {
            reply,
            addresses,
            denied: None,
        })
    }

    /// The records of an answer's first section. `None` if it is garbled.
    fn records<'a>(&self, answer: &'a Message<[u8]>) -> Option<Vec<AnyRecord<'a>>> {
        let mut records = Vec::new();
        for record in answer.answer().ok()?.into_records().take(RECORDS_MAX) {
            let record: AnyRecord<'a> = record.ok()?;
            if record.class() == Class::IN {
                records.push(record);
            }
        }
        Some(records)
    }

    /// The reply for the guest: of the records, those on the way from the name, and of addresses
    /// none but those.
    fn reply(
        &self,
        records: &[AnyRecord<'_>],
        rcode: Rcode,
        way: &[(Name<Vec<u8>>, Duration)],
    ) -> Option<Vec<u8>> {
        let target = HashCompressor::new(Vec::new());
        let mut reply = MessageBuilder::from_target(target)
            .ok()?
            .start_answer(&self.asked, rcode)
            .ok()?;
        reply.header_mut().set_ra(true);
        for record in records {
            let on_way = way.iter().any(|(name, _)| record.owner().name_eq(name));
            let kind = record.rtype();
            if on_way && (kind == self.kind || kind == Rtype::CNAME) {
                reply.push_ref(record).ok()?;
            }
        }
        Some(reply.finish().into_target())
    }

    /// The reply that says that no name server could be asked.
    #[must_use]
    pub fn failure(&self) -> Vec<u8> {
        empty(&self.asked, Rcode::SERVFAIL)
    }

    /// The reply as it goes by UDP: itself, or if it is too long for the guest, one that says to ask
    /// by TCP.
    #[must_use]
    pub fn for_udp(&self, reply: Vec<u8>) -> Vec<u8> {
        if reply.len() <= usize::from(self.udp_bytes) {
            return reply;
        }
        let mut short = MessageBuilder::new_vec().start_error(&self.asked, Rcode::NOERROR);
        short.header_mut().set_ra(true);
        short.header_mut().set_tc(true);
        short.finish()
    }
}

type AnyRecord<'a> = Record<ParsedName<&'a [u8]>, AllRecordData<&'a [u8], ParsedName<&'a [u8]>>>;
