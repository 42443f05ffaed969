//! A member of a pool: warmed, parked, and at last claimed.
//!
//! Under emulation a machine is quick at what it has done before, so a member runs commands before it
//! is parked. Parked, it stands still and costs no time. A claim is one message: it gives the member
//! its row's new name, lets it go on, and gives the guest its identity.

use std::time::Duration;

use jiff::Timestamp;
use smolvm_engine::ports;
use smolvm_engine::store::Identity;
use smolvm_engine::{NetworkSpec, SshSpec};
use smolvm_host::ProcessIdentity;
use smolvm_host::os::Os;
use smolvm_host::process::waited_for_processor;
use smolvm_proto::flow::{Overrun, ReceiveWindow};
use smolvm_proto::keeper::{ClaimRequest, KeeperEvent, KeeperFailure, KeeperReason};
use smolvm_proto::message::{Event, ExecRequest, Request};
use smolvm_proto::{Channel, Frame, Kind};
use tokio::time::Instant;

use crate::driver::{
    CLAIM_TIME, Claiming, Driver, End, Phase, WARM_STREAM, WARM_TIME, Waiter, broken, refusal,
    watch_starter,
};
use crate::error::KeeperError;

/// Bytes that are kept of what a command says last.
const SAID_BYTES: usize = 512;

/// What the command says that warms a member, on standard output and standard error.
#[derive(Debug, Default)]
pub(crate) struct Said {
    output: ReceiveWindow,
    error: ReceiveWindow,
    /// The end of it; of standard error alone, once that has been used.
    tail: Vec<u8>,
    complained: bool,
}

impl Said {
    /// Keeps the end, and says how much credit to grant.
    fn take(&mut self, channel: Channel, bytes: &[u8]) -> Result<Option<u32>, Overrun> {
        let complains = channel == Channel::Error;
        if complains && !self.complained {
            self.complained = true;
            self.tail.clear();
        }
        if complains || !self.complained {
            self.tail.extend_from_slice(bytes);
            let over = self.tail.len().saturating_sub(SAID_BYTES);
            self.tail.drain(..over);
        }
        let window = if complains {
            &mut self.error
        } else {
            &mut self.output
        };
        let length = u32::try_from(bytes.len()).map_err(|_| Overrun)?;
        window.received(length)?;
        Ok(window.consumed(length))
    }

    /// The last line that is not empty, without what would drive a terminal.
    fn last_line(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.tail);
        let line = text.lines().rev().find(|line| !line.trim().is_empty())?;
        let line: String = line.chars().filter(|char| !char.is_control()).collect();
        Some(line.trim().to_owned())
    }
}

impl Driver {
    /// Starts the command that is first in turn. Says whether there was one.
    pub(crate) fn warm_on(&mut self) -> bool {
        let Phase::Warming {
            deadline,
            left,
            said,
        } = &mut self.phase
        else {
            return false;
        };
        let Some(command) = left.front() else {
            return false;
        };
        *deadline = Instant::now() + WARM_TIME;
        *said = Said::default();
        let words = command.argv.iter();
        let argv = words.map(|word| word.clone().into_bytes().into()).collect();
        let request = Request::Exec(ExecRequest::plain(argv));
        self.guest
            .send(Frame::message(WARM_STREAM, Kind::Open, &request));
        true
    }

    /// Takes what the command under way has said, so that it is not stopped by a full window.
    pub(crate) fn hear_warm_output(&mut self, frame: &Frame) -> Option<End> {
        let Phase::Warming { said, .. } = &mut self.phase else {
            return None;
        };
        match said.take(frame.channel, &frame.payload) {
            Ok(Some(bytes)) => {
                self.guest
                    .send(Frame::credit(WARM_STREAM, frame.channel, bytes));
                None
            }
            Ok(None) => None,
            Err(error) => broken(format!("the guest's agent broke the rules: {error}")),
        }
    }

    /// Hears of the command under way, and parks the member after the last one.
    pub(crate) async fn hear_warm(&mut self, frame: &Frame) -> Option<End> {
        let Phase::Warming { left, said, .. } = &mut self.phase else {
            return None;
        };
        let last_words = said.last_line();
        let outcome = match frame.decode::<Event>() {
            Ok(Event::Exited(exited)) if exited.code == Some(0) => Ok(()),
            Ok(Event::Exited(exited)) => {
                let how = match (exited.code, exited.signal) {
                    (Some(code), _) => format!("it exited with code {code}"),
                    (None, signal) => format!("it was ended by signal {}", signal.unwrap_or(0)),
                };
                Err(match last_words {
                    Some(words) => format!("{how}; it last said: {words}"),
                    None => how,
                })
            }
            Ok(Event::Failed(failure)) => Err(failure.message),
            Ok(_) => return None,
            Err(error) => Err(error.to_string()),
        };
        let command = left.pop_front()?;
        if let Err(reason) = outcome
            && command.required
        {
            let command = command.shown();
            return broken(format!("the warm-up command `{command}` failed: {reason}"));
        }
        if self.warm_on() {
            return None;
        }
        // The guest has read all that was sent to it: it has answered the last of it.
        if let Err(error) = self.vm.pause().await {
            return broken(KeeperError::from(error).chain());
        }
        // That it stands still is what tells others that it can be claimed.
        match self
            .store
            .set_paused(&self.launch.id, Some(Timestamp::now()))
        {
            Ok(true) => {}
            Ok(false) => return broken(KeeperError::Declared.to_string()),
            Err(error) => return broken(error.to_string()),
        }
        let ready = self.ready();
        self.phase = Phase::Parked(ready.clone());
        for waiter in std::mem::take(&mut self.waiting_ready) {
            self.answer(waiter, &KeeperEvent::Ready(ready.clone()));
        }
        None
    }

    /// Makes the member a sandbox. Answered when the guest has its identity.
    pub(crate) async fn claim(&mut self, waiter: Waiter, claim: ClaimRequest) -> Option<End> {
        let not_parked = || {
            KeeperEvent::Failed(KeeperFailure {
                message: "the sandbox is no parked member of a pool".to_owned(),
                console: Vec::new(),
                reason: Some(KeeperReason::NotParked),
                hint: None,
            })
        };
        if !matches!(self.phase, Phase::Parked(_)) {
            self.answer(waiter, &not_parked());
            return None;
        }
        let identity = identity(&claim).and_then(|mut identity| {
            let held = ports::take_all(&Os::new(), &self.host, &self.store, &identity.ports)?;
            identity.ports = held.iter().map(|bound| bound.published).collect();
            Ok((identity, held))
        });
        let (identity, held) = match identity {
            Ok(both) => both,
            Err(error) => {
                self.answer(waiter, &refusal(&error));
                return None;
            }
        };
        // Before the guest is let go on. If the claim fails after all it stands still, and the next
        // claim sets its own.
        if let Err(error) = self.change_network(&identity.network) {
            self.answer(waiter, &refusal(&error));
            return None;
        }
        let claimed = self
            .store
            .claim_member(&self.launch.id, &identity, Timestamp::now());
        let pool = match claimed {
            Ok(Some(pool)) => pool,
            Ok(None) => {
                self.answer(waiter, &not_parked());
                return None;
            }
            Err(error) => {
                self.answer(waiter, &refusal(&error));
                return None;
            }
        };
        self.claiming = Some(Claiming {
            pool,
            starved: waited_for_processor(self.vm.pid()).unwrap_or_default(),
        });
        self.begun = Instant::now();
        self.ports.hold(held);
        self.launch.name = claim.name;
        self.launch.env = identity.env;
        self.launch.workdir = identity.workdir;
        self.launch.user = identity.user;
        self.launch.ttl_ms = claim.ttl_ms;
        self.launch.ephemeral = claim.ephemeral;
        self.waiting_ready.push(waiter);
        self.phase = Phase::Booting {
            deadline: self.begun + CLAIM_TIME,
            hello: true,
        };
        if let Some(starter) = claim.starter {
            let starter = ProcessIdentity {
                pid: starter.pid,
                start_time_ticks: starter.start_time_ticks,
                boot_id: starter.boot_id,
            };
            if let Err(error) = watch_starter(&starter, self.inbox.clone()) {
                return broken(error.chain());
            }
        }
        // Sent first, so that it is there when the guest wakes.
        if let Some(end) = self.send_birth(false) {
            return Some(end);
        }
        match self.vm.resume().await {
            Ok(()) => None,
            Err(error) => broken(KeeperError::from(error).chain()),
        }
    }
}

/// What the store is told; the claim was checked by the one who makes it.
fn identity(claim: &ClaimRequest) -> smolvm_engine::Result<Identity> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Identity {
        name: claim.name.parse()?,
        env: claim
            .env
            .iter()
            .map(|variable| (text(&variable.name), text(&variable.value)))
            .collect(),
        workdir: claim.cwd.clone(),
        user: claim.user.clone(),
        ttl: claim.ttl_ms.map(Duration::from_millis),
        ephemeral: claim.ephemeral,
        ports: claim
            .ports
            .iter()
            .flatten()
            .map(ports::published)
            .collect::<smolvm_engine::Result<_>>()?,
        network: match &claim.network {
            Some(policy) => NetworkSpec::from_message(policy)?,
            None => NetworkSpec::off(),
        },
        ssh: claim
            .ssh_keys
            .as_ref()
            .map(|keys| SshSpec::new(keys.iter().map(String::as_str)))
            .transpose()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_complaint_is_kept_and_credit_is_granted() {
        let mut said = Said::default();
        assert_eq!(said.last_line(), None);
        assert_eq!(said.take(Channel::Output, b"one\ntwo\n\n"), Ok(None));
        assert_eq!(said.last_line().as_deref(), Some("two"));
        assert_eq!(said.take(Channel::Error, b"\x1b[31mno\x07\n"), Ok(None));
        assert_eq!(said.take(Channel::Output, b"three"), Ok(None));
        assert_eq!(said.last_line().as_deref(), Some("[31mno"));
        // More than a window, in pieces: all of it is granted again, and little of it kept.
        let mut granted = 0;
        for _ in 0..smolvm_proto::limits::WINDOW_BYTES / 1024 * 2 {
            let more = said.take(Channel::Error, &[b'x'; 1024]);
            granted += more.expect("within the window").unwrap_or(0);
        }
        assert!(granted > smolvm_proto::limits::WINDOW_BYTES, "{granted}");
        assert_eq!(said.tail.len(), SAID_BYTES);
    }
}
