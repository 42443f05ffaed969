//! Making a guest stand still: to pause it, or to copy it.
//!
//! It may stand still only when it has read every frame that was sent to it, and none is half sent,
//! because a copy of it will talk to another host ([`smolvm_proto::rejoin`]). So it is asked first;
//! what comes for it meanwhile is held back.

use std::path::Path;

use jiff::Timestamp;
use smolvm_engine::layout::SavedMachine;
use smolvm_engine::{Error, ErrorKind};
use smolvm_host::os::Os;
use smolvm_proto::keeper::{Captured, Done, KeeperEvent};
use smolvm_proto::message::Request;
use smolvm_proto::{Frame, Kind};
use tokio::time::Instant;

use crate::driver::{
    self, Driver, End, Motion, PING_STREAM, Phase, STILL_TIME, Waiter, Wish, broken, failure,
};
use crate::error::KeeperError;

impl Driver {
    /// Begins to make the guest stand still, for `wish`.
    pub(crate) async fn ask_to_stand_still(&mut self, wish: Wish) {
        let serving = matches!(self.phase, Phase::Serving(_));
        let name = &self.launch.name;
        let refusal = match (&self.motion, &wish) {
            _ if !serving => not_serving(name),
            (Motion::Moving | Motion::Still { .. }, Wish::Capture(..))
                if self.comes_again && self.routes.any() =>
            {
                in_use(name)
            }
            (Motion::Asked { .. } | Motion::CutOff { .. }, _) => Error::new(
                ErrorKind::Busy,
                format!("sandbox `{name}` is being paused or copied by another command"),
            )
            .hint("try again when that has ended; it takes a moment"),
            (Motion::Moving, _) => {
                self.guest
                    .send(Frame::message(PING_STREAM, Kind::Open, &Request::Ping));
                self.motion = Motion::Asked {
                    deadline: Instant::now() + STILL_TIME,
                    wish,
                    held: Vec::new(),
                };
                return;
            }
            // Stands still already.
            (Motion::Still { .. }, Wish::Pause(waiter)) => {
                self.answer(*waiter, &KeeperEvent::Done(Done::default()));
                return;
            }
            (Motion::Still { .. }, Wish::Capture(waiter, directory)) => {
                let captured = self.capture(directory).await;
                if let Motion::Still { cut_off, .. } = &mut self.motion {
                    *cut_off |= self.comes_again;
                }
                let answer = match captured {
                    Ok(_) => KeeperEvent::Captured(Captured { paused_us: 0 }),
                    Err(error) => failure(error.chain(), Vec::new()),
                };
                self.answer(*waiter, &answer);
                return;
            }
        };
        self.answer(wish.waiter(), &driver::refusal(&refusal));
    }

    /// The guest has read everything: it may stand still.
    pub(crate) async fn stand_still(&mut self) {
        let Motion::Asked { wish, held, .. } = std::mem::replace(&mut self.motion, Motion::Moving)
        else {
            return;
        };
        match wish {
            Wish::Pause(waiter) => {
                let paused = self.vm.pause().await.map_err(KeeperError::from);
                let recorded = match paused {
                    Ok(()) => self
                        .store
                        .set_paused(&self.launch.id, Some(Timestamp::now()))
                        .map_err(KeeperError::from),
                    Err(error) => Err(error),
                };
                match recorded {
                    Ok(_) => {
                        self.motion = Motion::Still {
                            held,
                            cut_off: false,
                        };
                        self.answer(waiter, &KeeperEvent::Done(Done::default()));
                    }
                    Err(error) => {
                        // It moves on, as it did; if it cannot, its end will be noticed.
                        let _ = self.vm.resume().await;
                        self.release(held);
                        self.answer(waiter, &failure(error.chain(), Vec::new()));
                    }
                }
            }
            Wish::Capture(waiter, directory) => {
                let captured = self.capture(&directory).await;
                let moving = self.vm.resume().await.map_err(KeeperError::from);
                let answer = match captured.and_then(|still| moving.map(|()| still)) {
                    Ok(still) => KeeperEvent::Captured(Captured {
                        paused_us: u64::try_from(still.elapsed().as_micros()).unwrap_or(u64::MAX),
                    }),
                    Err(error) => failure(error.chain(), Vec::new()),
                };
                if self.comes_again {
                    self.motion = Motion::CutOff { held };
                } else {
                    // Its clock stood still as well.
                    let _ = self.send_birth(true);
                    self.release(held);
                }
                self.answer(waiter, &answer);
            }
        }
    }

    /// The guest did not say that it has read everything.
    pub(crate) fn will_not_stand_still(&mut self) {
        let Motion::Asked { wish, held, .. } = std::mem::replace(&mut self.motion, Motion::Moving)
        else {
            return;
        };
        self.release(held);
        let message = format!(
            "the guest of sandbox `{}` did not answer within {} s, so it was not made to stand still",
            self.launch.name,
            STILL_TIME.as_secs()
        );
        self.answer(wish.waiter(), &failure(message, Vec::new()));
    }

    /// Lets a paused guest go on, and gives it its clock back. Answered when it has that.
    pub(crate) async fn resume(&mut self, waiter: Waiter) -> Option<End> {
        if !matches!(self.phase, Phase::Serving(_)) {
            self.answer(waiter, &driver::refusal(&not_serving(&self.launch.name)));
            return None;
        }
        if !matches!(self.motion, Motion::Still { .. }) {
            self.answer(waiter, &KeeperEvent::Done(Done::default()));
            return None;
        }
        self.waiting_resume.push(waiter);
        match self.move_on().await {
            Ok(()) => None,
            Err(reason) => broken(reason),
        }
    }

    /// Lets the guest go on if it stands still.
    pub(crate) async fn move_on(&mut self) -> Result<(), String> {
        let (held, cut_off) = match std::mem::replace(&mut self.motion, Motion::Moving) {
            Motion::Still { held, cut_off } => (held, cut_off),
            other => {
                self.motion = other;
                return Ok(());
            }
        };
        self.vm
            .resume()
            .await
            .map_err(|error| KeeperError::from(error).chain())?;
        if let Err(error) = self.store.set_paused(&self.launch.id, None) {
            tracing::warn!(%error, "could not record that the sandbox goes on");
        }
        if cut_off {
            self.motion = Motion::CutOff { held };
            return Ok(());
        }
        // Before anything that was held back: whoever sent that may ask for the time.
        if let Some(End::Broken { reason, .. }) = self.send_birth(true) {
            return Err(reason);
        }
        self.release(held);
        Ok(())
    }

    /// The guest that was cut off has come again: it goes on as one that was resumed.
    pub(crate) fn reunite(&mut self) -> Option<End> {
        if let Motion::CutOff { held } = std::mem::replace(&mut self.motion, Motion::Moving) {
            if let Some(end) = self.send_birth(true) {
                return Some(end);
            }
            self.release(held);
        }
        None
    }

    fn release(&mut self, held: Vec<Frame>) {
        for frame in held {
            self.guest.send(frame);
        }
    }

    /// Writes the machine to `directory`: memory, state, and its own disk if it has one. It stands
    /// still afterwards. Returns since when.
    async fn capture(&mut self, directory: &Path) -> Result<std::time::Instant, KeeperError> {
        let files = SavedMachine::new(directory.to_owned());
        let still = self
            .vm
            .snapshot(&files.state(), Some(&files.memory()))
            .await?;
        let own_disk = self.launch.vm.disks.iter().find(|disk| !disk.read_only);
        if let Some(disk) = own_disk {
            let (from, to) = (disk.path.clone(), files.disk());
            tokio::task::spawn_blocking(move || {
                Os::new().copy_sparse("copy the sandbox's disk to", &from, &to)
            })
            .await
            .map_err(|error| KeeperError::io("copy the disk", std::io::Error::other(error)))?
            .map_err(smolvm_engine::Error::from)?;
        }
        Ok(still)
    }
}

fn in_use(name: &str) -> Error {
    Error::new(
        ErrorKind::Busy,
        format!(
            "commands or connections of sandbox `{name}` are open, and Firecracker would cut them off"
        ),
    )
    .hint("copy it when they have ended")
}

fn not_serving(name: &str) -> Error {
    Error::new(
        ErrorKind::NotRunning,
        format!("sandbox `{name}` does not run yet, or is going down"),
    )
    .hint("see its state with `smolvm ls --all`")
}

impl Wish {
    fn waiter(&self) -> Waiter {
        match self {
            Wish::Pause(waiter) | Wish::Capture(waiter, _) => *waiter,
        }
    }
}
