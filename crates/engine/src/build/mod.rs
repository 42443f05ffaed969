//! Building images from Dockerfiles, in sandboxes, without Docker.
//!
//! ```text
//! dockerfile  text to instructions; what cannot be done is refused here          pure
//! recipe      `smolvm.toml` to the same instructions                             pure
//! words       variables and quotes                                               pure
//! patterns    `*` in paths; what `.dockerignore` leaves out                      pure
//! context     the files that may be copied, and their digests
//! plan        which stages and steps, and the key of each                        pure but for look-ups
//! run         carries a plan out: finds kept layers, starts sandboxes, copies, commits
//! layers      layers that are kept: their files and rows
//! ```
//!
//! All of a file is understood, all images are there and all files are hashed before anything runs.
//! Each step that changes files has a key, a hash of everything it depends on; after it has run, the
//! sandbox's writable layer is kept under that key, and the next build with the same key begins there.
//! What the last step leaves is read by the guest and written as an image, as `smolvm commit` does.

mod context;
mod dockerfile;
mod layers;
mod patterns;
mod plan;
mod recipe;
mod run;
mod words;

use std::path::PathBuf;

use jiff::Timestamp;
use smolvm_host::cancel::Cancel;
use smolvm_host::image::{ImportRequest, import_tar};

use self::context::{Context, Found};
use self::dockerfile::Dockerfile;
use self::plan::{Base, Choices, SCRATCH, Sources};
use crate::assets::Watcher;
use crate::engine::{Engine, ImageInfo};
use crate::error::{Error, ErrorKind, Result};
use crate::images::{ImageName, Staged};
use crate::network::NetworkSpec;
use crate::oci::PullPolicy;
use crate::spec::KernelChoice;

/// What a build is described by, understood and found to be possible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildFile(Dockerfile);

impl BuildFile {
    /// Reads a Dockerfile. `name` is what errors call it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] or [`ErrorKind::Unsupported`], with the line.
    pub fn dockerfile(text: &str, name: &str) -> Result<Self> {
        Dockerfile::parse(text, name).map(Self)
    }

    /// Reads a `smolvm.toml`. `name` is what errors call it.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`], with line and key.
    pub fn recipe(text: &str, name: &str) -> Result<Self> {
        recipe::parse(text, name).map(Self)
    }
}

/// An image to build.
#[derive(Debug, Clone)]
pub struct BuildSpec {
    /// What is done.
    pub file: BuildFile,
    /// Directory that files are copied from.
    pub context: PathBuf,
    /// Files that say what of it is left out; the first that is there counts.
    pub ignore_files: Vec<PathBuf>,
    /// Name of the image; `build:` and some digits if absent.
    pub name: Option<ImageName>,
    /// Values of the file's arguments.
    pub args: Vec<(String, String)>,
    /// Name or number of the stage to build; the last one if absent.
    pub target: Option<String>,
    /// Whether layers that earlier builds kept are used.
    pub cached: bool,
    /// When images to begin with are pulled.
    pub pull: PullPolicy,
    /// What commands may reach.
    pub network: NetworkSpec,
    /// Virtual CPUs of the sandboxes that are built in.
    pub cpus: u8,
    /// Their memory in MiB.
    pub memory_mib: u32,
    /// Room for changes to the image, in MiB.
    pub disk_mib: u32,
    /// The kernel they boot.
    pub kernel: KernelChoice,
}

/// A step, as it begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BuildStep<'a> {
    /// Its number, from 1.
    pub number: usize,
    /// How many steps there are.
    pub total: usize,
    /// The instruction on one line.
    pub text: &'a str,
    /// Whether it does not run, because a kept layer has its outcome.
    pub cached: bool,
}

/// Told about a build.
pub trait BuildWatcher: Watcher + Send {
    /// A step begins, or is found done.
    fn step(&mut self, step: &BuildStep<'_>);
    /// A command wrote this, to standard error if `error`.
    fn output(&mut self, bytes: &[u8], error: bool);
}

/// An image that was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltImage {
    /// The image.
    pub image: ImageInfo,
    /// The digest that the name had before, if another.
    pub replaced: Option<String>,
    /// Steps that ran.
    pub ran: usize,
    /// Steps whose outcome was kept from before.
    pub cached: usize,
    /// What in the file is left out, and what was given for nothing.
    pub warnings: Vec<String>,
}

impl Engine {
    /// Builds an image. One of the same name is replaced; sandboxes that were made from it keep it.
    /// Long; run it on a thread that may block, and that drives no event loop.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`], [`ErrorKind::NotFound`] and others for what the file cannot mean,
    /// with its line, before anything runs; [`ErrorKind::GuestFailed`] if a command fails, with its line
    /// and exit code; [`ErrorKind::NoSpace`]; [`ErrorKind::Cancelled`]. Images are as they were then;
    /// layers of the steps that were done are kept for the next build.
    pub fn build_image(
        &self,
        spec: &BuildSpec,
        watcher: &mut dyn BuildWatcher,
        cancel: &Cancel,
    ) -> Result<BuiltImage> {
        let context = Context::open(&spec.context, &spec.ignore_files)?;
        let choices = Choices {
            args: &spec.args,
            target: spec.target.as_deref(),
        };
        let mut sources = HostSources {
            engine: self,
            spec,
            context: &context,
            watcher: &mut *watcher,
            cancel,
        };
        let plan = plan::plan(&spec.file.0, &choices, &mut sources)?;
        run::run(self, spec, plan, watcher, cancel)
    }
}

/// Looks images up in the store, and files up on the host.
struct HostSources<'a> {
    engine: &'a Engine,
    spec: &'a BuildSpec,
    context: &'a Context,
    watcher: &'a mut dyn BuildWatcher,
    cancel: &'a Cancel,
}

impl Sources for HostSources<'_> {
    fn image(&mut self, name: &str) -> Result<Base> {
        let engine = self.engine;
        if name == SCRATCH {
            engine.make_scratch(self.cancel)?;
        } else if name == crate::spec::DEFAULT_IMAGE {
            if engine.image(name).is_err() {
                engine.prepare(name, &self.spec.kernel, self.watcher, self.cancel)?;
            }
        } else {
            engine.require_image(name, self.spec.pull, self.watcher, self.cancel)?;
        }
        let image = engine.image(name)?;
        Ok(Base {
            name: image.name,
            digest: image.digest,
            config: image.config,
        })
    }

    fn find(&mut self, source: &str, unpack: bool) -> Result<Vec<Found>> {
        self.context.find(source, unpack, self.cancel)
    }
}

impl Engine {
    /// Makes the image that has nothing in it, if it is not there.
    fn make_scratch(&self, cancel: &Cancel) -> Result<()> {
        let mut store = self.store()?;
        if store.image_named(SCRATCH)?.is_some() {
            return Ok(());
        }
        let name: ImageName = SCRATCH.parse()?;
        let assets = self.assets();
        let making = assets.begin_making()?;
        let created_at = Timestamp::now();
        let empty = tar::Builder::new(Vec::new())
            .into_inner()
            .map_err(|error| crate::error::io("could not write to memory", error))?;
        let image = import_tar(
            self.os(),
            &mut empty.as_slice(),
            &ImportRequest {
                name: SCRATCH,
                created: &created_at.to_string(),
                source: "nothing",
                empty: &[],
            },
            &making.dir.join("image"),
            cancel,
        )?;
        let staged = Staged {
            making,
            manifest: image.manifest,
            created_at,
            oci: None,
            config: smolvm_host::oci::ImageConfig::default(),
        };
        match assets.publish_image(&mut store, staged, &name, false) {
            // Somebody else made it just now.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            other => other.map(drop),
        }
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "building the image was cancelled")
}
