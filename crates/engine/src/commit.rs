//! Making an image of what a running sandbox's root file system is now.
//!
//! The guest's agent reads the root, base and changes as the guest sees them, and sends it as a tar
//! stream; a thread here writes the image as the stream comes, so nothing is copied twice. Commands
//! in the sandbox stand still meanwhile, unless the caller wants otherwise.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use smolvm_host::cancel::Cancel;
use smolvm_host::oci::ImageConfig;
use smolvm_proto::Channel;
use smolvm_proto::message::{ArchiveRequest, Event, Request};
use tokio::sync::mpsc;

use crate::assets::{Progress, Watcher};
use crate::client::Heard;
use crate::engine::{Engine, ImageInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::files::{PIECES_MAX, PieceReader};
use crate::images::{ImageName, Staged, name_taken};
use crate::session::Session;
use crate::store::Store;

/// Where a tar header says what it is, and what it says of a global pax header.
const TYPE_AT: usize = 156;
const GLOBAL: u8 = b'g';

/// Time a guest has to say how full its disk is.
const FACTS_TIME: Duration = Duration::from_secs(30);

/// How to commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommitOptions {
    /// Whether an image of this name is replaced. Sandboxes that were made from it keep it.
    pub replace: bool,
    /// Whether the sandbox's commands stand still meanwhile, so that what they write together is
    /// together in the image.
    pub pause: bool,
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self {
            replace: false,
            pause: true,
        }
    }
}

/// An image that was made of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// The image.
    pub image: ImageInfo,
    /// The digest that the name had before, if another.
    pub replaced: Option<String>,
}

impl Engine {
    /// Makes an image named `image` of the root file system of a running sandbox: its base and all
    /// changes, also those on a shared or memory-backed disk. Other mounts and sockets are left
    /// out, and `/etc/machine-id` is empty. Ends early, with nothing left of it, if `stop` is ready
    /// first.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotRunning`] with the command that starts it, [`ErrorKind::AlreadyExists`],
    /// [`ErrorKind::NoSpace`], [`ErrorKind::Timeout`] if the guest answers nothing any more,
    /// [`ErrorKind::Cancelled`]. Nothing has changed then.
    pub async fn commit(
        &self,
        name: &str,
        image: &ImageName,
        options: &CommitOptions,
        watcher: &mut (dyn Watcher + Send),
        stop: impl Future<Output = ()> + Send,
    ) -> Result<Committed> {
        if !options.replace
            && self
                .images()?
                .iter()
                .any(|known| known.name == image.as_str())
        {
            return Err(name_taken(image));
        }
        let mut stop = pin!(stop);
        let prepared = async {
            let session = self.connect(name).await?;
            let base = self.base(name)?;
            let expected = expected_bytes(base.as_ref(), &session).await?;
            Ok::<_, Error>((session, base, expected))
        };
        let (session, base, expected) = tokio::select! {
            prepared = prepared => prepared?,
            () = &mut stop => return Err(cancelled(name)),
        };
        // What a command meets in the image it met in the sandbox. The sandbox's own environment may
        // hold secrets, and stays with it.
        let config = base.map(|base| base.config).unwrap_or_default();
        let source = format!("committed from sandbox `{}`", session.name());
        let what = Receive {
            image,
            source,
            config,
            pause: options.pause,
            expected,
        };
        let staged = session
            .unless_hung(self.receive(&session, what, watcher, stop))
            .await?;
        let mut store = Store::open(&self.layout().database())?;
        let published = self
            .assets()
            .publish_image(&mut store, staged, image, options.replace)?;
        Ok(Committed {
            image: published.image.into(),
            replaced: published.replaced,
        })
    }

    /// The image a sandbox was made of, if it is still there.
    fn base(&self, name: &str) -> Result<Option<ImageInfo>> {
        let image = self.info(name)?.image;
        let mut images = self.images()?.into_iter();
        Ok(images.find(|known| known.name == image))
    }

    /// Has the guest send its root, and a thread write it.
    pub(crate) async fn receive(
        &self,
        session: &Session,
        what: Receive<'_>,
        watcher: &mut (dyn Watcher + Send),
        stop: impl Future<Output = ()> + Send,
    ) -> Result<Staged> {
        let Receive {
            image,
            source,
            config,
            pause,
            expected,
        } = what;
        let cancel = Cancel::new()?;
        let mut stream = session.client.open(&Request::Archive(ArchiveRequest {
            path: b"/".to_vec().into(),
            follow: false,
            complete: Some(true),
            hold: Some(pause),
        }))?;
        let (sender, pieces) = mpsc::channel(PIECES_MAX);
        let writing = tokio::task::spawn_blocking({
            let (engine, image, cancel) = (self.clone(), image.clone(), cancel.clone());
            move || {
                let mut pieces = PieceReader::new(pieces);
                engine
                    .assets()
                    .stage_image(&mut pieces, &image, &source, config, &cancel)
            }
        });
        let (mut writing, mut stop) = (pin!(writing), pin!(stop));
        let mut written = None;
        let mut sender = Some(sender);
        let mut bytes = 0_u64;
        let received = loop {
            let heard = tokio::select! {
                heard = stream.next() => heard,
                () = &mut stop => break Err(cancelled(session.name())),
            };
            match heard {
                Ok(Heard::Data(Channel::Output, piece)) => {
                    if bytes == 0 && piece.get(TYPE_AT) != Some(&GLOBAL) {
                        break Err(too_old(session));
                    }
                    bytes += piece.len() as u64;
                    report(
                        watcher,
                        image,
                        "reading the root file system",
                        Some((bytes, expected)),
                    );
                    let Some(queue) = &sender else { continue };
                    if queue.send(piece).await.is_err() {
                        // The archive's end was seen already, or writing failed; of the latter there
                        // is nothing to wait for.
                        sender = None;
                        let ended = writing.as_mut().await;
                        let failed = !matches!(&ended, Ok(Ok(_)));
                        written = Some(ended);
                        if failed {
                            break Ok(());
                        }
                    }
                }
                Ok(Heard::Event(Event::Done)) => break Ok(()),
                Ok(Heard::Event(other)) => break Err(session.confused(&other)),
                Ok(Heard::Data(..) | Heard::End(_)) => {}
                Err(error) => break Err(error),
            }
        };
        // Gives the guest's commands free, if they stand still.
        drop(stream);
        match &received {
            // A stream that broke off is told apart from one that ended by a last word on the queue.
            Ok(()) => {
                if let Some(queue) = &sender {
                    // Nobody takes it if the archive's end was seen.
                    let _ = queue.send(Vec::new()).await;
                }
                report(watcher, image, "writing the image", None);
            }
            Err(_) => cancel.cancel(),
        }
        drop(sender);
        let written = match written {
            Some(written) => written,
            None => tokio::select! {
                written = &mut writing => written,
                () = &mut stop, if received.is_ok() => {
                    cancel.cancel();
                    writing.await
                }
            },
        };
        let written = written
            .map_err(|panic| Error::new(ErrorKind::Internal, "writing failed").because(panic))?;
        received?;
        written
    }
}

/// What is made of a guest's root.
pub(crate) struct Receive<'a> {
    pub(crate) image: &'a ImageName,
    /// Where it comes from, for people.
    pub(crate) source: String,
    pub(crate) config: ImageConfig,
    /// Whether commands stand still meanwhile.
    pub(crate) pause: bool,
    /// Bytes that will come, roughly.
    pub(crate) expected: u64,
}

/// How many bytes will come, roughly: the base, and what the writable layer holds.
async fn expected_bytes(base: Option<&ImageInfo>, session: &Session) -> Result<u64> {
    expected_over(base.map_or(0, |base| base.size_bytes), session).await
}

/// The same over a base of this size.
pub(crate) async fn expected_over(base: u64, session: &Session) -> Result<u64> {
    let facts = session.facts_within(FACTS_TIME).await?;
    let changed = facts.disk_total_bytes.saturating_sub(facts.disk_free_bytes);
    Ok(base + changed)
}

fn report(
    watcher: &mut (dyn Watcher + Send),
    image: &ImageName,
    phase: &str,
    part: Option<(u64, u64)>,
) {
    #[expect(
        clippy::cast_precision_loss,
        reason = "a bar does not show the difference"
    )]
    let fraction = part.map(|(done, whole)| (done as f64 / whole.max(1) as f64).min(1.0));
    watcher.progress(&Progress {
        task: format!("image {image}"),
        phase: phase.to_owned(),
        fraction,
    });
}

fn cancelled(name: &str) -> Error {
    Error::new(
        ErrorKind::Cancelled,
        format!("committing sandbox `{name}` was cancelled"),
    )
}

fn too_old(session: &Session) -> Error {
    let name = session.name();
    Error::new(
        ErrorKind::Unsupported,
        format!("sandbox `{name}` was started by an older smolvm, whose agent cannot give all of its root"),
    )
    .hint(format!(
        "start it anew, with `smolvm stop {name}` and `smolvm start {name}`, then commit it"
    ))
}
