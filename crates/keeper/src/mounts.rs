//! Directories of the host that the guest mounts.
//!
//! The keeper serves them, each on a thread of its own, as the one who owns the directory. To its driver
//! it is a client as others are, but that it comes first: commands find everything mounted.

use std::io;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use smolvm_engine::{ConnectionEvent, Mount};
use smolvm_host::os::Os;
use smolvm_host::share::{Requests, Share, ShareOptions};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::driver::Input;
use crate::ports::Line;

/// Most time that all mounts may take.
pub(crate) const MOUNT_TIME: Duration = Duration::from_secs(30);

/// Requests and answers that may wait for each other. The guest's kernel sends no more than some dozen
/// at a time.
const WAITING_MAX: usize = 32;
/// Bytes of a serving thread's stack; its buffers are on the heap.
const STACK_BYTES: usize = 256 * 1024;
/// Most files the guest's kernel may know of in one mount, each of which is an open descriptor here.
const FILES_MAX: u64 = 500_000;
/// Descriptors that are left for everything else.
const RESERVED: u64 = 4096;

/// All mounts of a sandbox. Dropping it ends them.
#[derive(Debug, Default)]
pub(crate) struct Mounts(Vec<JoinHandle<()>>);

impl Drop for Mounts {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl Mounts {
    /// Begins to mount, the outer ones first. [`Input::Mounted`] says what came of it.
    pub(crate) fn begin(mounts: &[Mount], line: &Line, inbox: &mpsc::Sender<Input>) -> Self {
        let mut mounts = mounts.to_vec();
        mounts.sort_by_key(|mount| mount.target.matches('/').count());
        let files_max = files_max(mounts.len());
        let (line, inbox) = (line.clone(), inbox.clone());
        // One after the other: a place for one may be in another.
        let all = tokio::spawn(async move {
            let mut serving = Mounts::default();
            for mount in mounts {
                match begin_one(&mount, &line, files_max).await {
                    Ok(task) => serving.0.push(task),
                    Err(error) => {
                        let why = smolvm_engine::in_one_line(&error);
                        let source = mount.source.display();
                        let reason = format!("could not mount {source} on {}: {why}", mount.target);
                        let _ = inbox.send(Input::Mounted(Err(reason))).await;
                        return;
                    }
                }
            }
            if inbox.send(Input::Mounted(Ok(()))).await.is_ok() {
                // Serves for as long as it is not aborted.
                std::future::pending::<()>().await;
            }
        });
        Self(vec![all])
    }
}

/// How many files each of `mounts` may have known, after as many descriptors were asked for as this
/// process may have (getrlimit(2)).
fn files_max(mounts: usize) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.unwrap_or(FILES_MAX * 2);
    let raised = Rlimit {
        current: Some(most),
        maximum: limit.maximum,
    };
    let have = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => most,
        Err(_) => limit.current.unwrap_or(most),
    };
    let each = have.saturating_sub(RESERVED) / u64::try_from(mounts.max(1)).unwrap_or(1);
    usize::try_from(each.clamp(64, FILES_MAX)).unwrap_or(64)
}

/// Mounts one directory, and serves it from then on.
async fn begin_one(
    mount: &Mount,
    line: &Line,
    files_max: usize,
) -> smolvm_engine::Result<JoinHandle<()>> {
    let options = ShareOptions {
        read_only: mount.read_only,
        guest_owner: (0, 0),
        files_max,
    };
    let share = Share::open(&Os::new(), &mount.source, options)?;
    let mut connection = line.session().await?.open_mount(mount)?;
    loop {
        match connection.next().await? {
            ConnectionEvent::Opened(_) => break,
            ConnectionEvent::Closed => {
                return Err(smolvm_engine::Error::new(
                    smolvm_engine::ErrorKind::GuestFailed,
                    "the guest's agent ended it at once",
                ));
            }
            ConnectionEvent::Data(_) | ConnectionEvent::End => {}
        }
    }
    let (ask, asked) = mpsc::channel(WAITING_MAX);
    let (answers, mut answered) = mpsc::channel(WAITING_MAX);
    std::thread::Builder::new()
        .name("mount".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || serve(share, asked, &answers))
        .map_err(|error| {
            let doing = "could not start a thread for a mount";
            smolvm_engine::Error::new(smolvm_engine::ErrorKind::Internal, doing).because(error)
        })?;
    let target = mount.target.clone();
    Ok(tokio::spawn(async move {
        let input = connection.input();
        let upwards = async {
            while let Some(answer) = answered.recv().await {
                if !input.write(&answer).await? {
                    break;
                }
            }
            Ok(())
        };
        let downwards = async {
            let mut requests = Requests::default();
            loop {
                match connection.next().await? {
                    ConnectionEvent::Data(bytes) => requests.feed(&bytes),
                    ConnectionEvent::Closed => return Ok(()),
                    ConnectionEvent::Opened(_) | ConnectionEvent::End => {}
                }
                let broken = |error: io::Error| {
                    let what = "the guest's kernel asks what is no request";
                    smolvm_engine::Error::new(smolvm_engine::ErrorKind::Internal, what)
                        .because(error)
                };
                while let Some(request) = requests.next_request().map_err(broken)? {
                    if ask.send(request).await.is_err() {
                        return Ok(());
                    }
                }
            }
        };
        let ended: smolvm_engine::Result<()> = tokio::select! {
            ended = upwards => ended,
            ended = downwards => ended,
        };
        match ended {
            Ok(()) => tracing::debug!(target, "a mount ended"),
            Err(error) => {
                let error = smolvm_engine::in_one_line(&error);
                tracing::warn!(target, error, "a mount broke");
            }
        }
    }))
}

/// Answers on this thread, as the directory's owner, until nobody asks any more.
fn serve(mut share: Share, mut asked: mpsc::Receiver<Vec<u8>>, answers: &mpsc::Sender<Vec<u8>>) {
    if let Err(error) = share.become_owner() {
        tracing::error!(%error, "could not act as the owner of a directory, which is not served");
        return;
    }
    while let Some(request) = asked.blocking_recv() {
        if let Some(answer) = share.answer(&request)
            && answers.blocking_send(answer).is_err()
        {
            return;
        }
    }
}
