//! Carrying a plan out.
//!
//! Nothing is done that nobody needs: a stage is looked at when the image or a copy needs it, and a step
//! runs only if the last layer that is kept of its stage does not have it. Consecutive steps run in one
//! sandbox. All sandboxes are gone when this ends, however it ends: they belong to the connection of
//! this process.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsString;

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags};
use smolvm_host::cancel::Cancel;
use tokio::sync::oneshot;

use super::context::FoundKind;
use super::dockerfile::{Place, mistake};
use super::layers::layer_gone;
use super::patterns::Pattern;
use super::plan::{Action, Base, Destination, Origin, Plan, RunAction};
use super::{BuildSpec, BuildStep, BuildWatcher, BuiltImage, cancelled};
use crate::commit::{Receive, expected_over};
use crate::engine::{Beginning, Engine, random_u64, wait_for_any};
use crate::error::{Error, ErrorKind, Result, io};
use crate::exec::{ExecEvent, ExecSpec};
use crate::files::CopyTo;
use crate::images::{ImageName, Published};
use crate::network::NetworkSpec;
use crate::session::{FileKind, Session};
use crate::spec::{DiskMode, SandboxName, SandboxSpec};
use crate::store::{BuildLayerRow, Store};

/// Where a script lies while it runs: in the guest's memory, and so in no image.
const SCRIPT_DIR: &str = "/dev/shm";
const SCRIPT_NAME: &str = "smolvm-step";

/// A disk with less room than this is why a command failed.
const LITTLE_BYTES: u64 = 16 << 20;

/// Who owns what is copied if nobody is named.
const ROOT: &str = "0:0";

/// Carries a plan out, on a thread that drives no event loop.
pub(super) fn run(
    engine: &Engine,
    spec: &BuildSpec,
    plan: Plan,
    watcher: &mut dyn BuildWatcher,
    cancel: &Cancel,
) -> Result<BuiltImage> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| io("could not start an event loop", error))?;
    let mut first = Vec::new();
    let mut total = 0;
    for stage in &plan.stages {
        first.push(total + 1);
        total += 1 + stage.steps.len();
    }
    let mut build = Build {
        engine,
        spec,
        watcher,
        cancel,
        store: engine.store()?,
        tops: vec![None; plan.stages.len()],
        machines: BTreeMap::new(),
        names: Vec::new(),
        made: HashSet::new(),
        first,
        total,
        ran: 0,
        cached: 0,
        plan,
    };
    let (tell, mut told) = oneshot::channel();
    let done = Cancel::new()?;
    std::thread::scope(|scope| {
        let watched = scope.spawn(|| {
            let mut fds = [
                PollFd::from_borrowed_fd(cancel.event(), PollFlags::IN),
                PollFd::from_borrowed_fd(done.event(), PollFlags::IN),
            ];
            let waited = wait_for_any(&mut fds, None);
            if cancel.is_cancelled() {
                // Nobody listens only if the build is done.
                let _ = tell.send(());
            }
            waited
        });
        let built = runtime.block_on(async {
            let built = tokio::select! {
                built = build.image() => built,
                Ok(()) = &mut told => Err(cancelled()),
            };
            build.clean_up().await;
            built
        });
        done.cancel();
        match watched.join() {
            Ok(Ok(_)) => built,
            // Without it nothing could have been cancelled; what was built is built.
            Ok(Err(error)) => built.and(Err(error)),
            Err(_) => Err(Error::new(
                ErrorKind::Internal,
                "waiting for a cancellation failed",
            )),
        }
    })
}

/// A sandbox to build in.
struct Machine {
    name: SandboxName,
    session: Session,
    disk: std::path::PathBuf,
    disk_mib: u32,
}

struct Build<'a> {
    engine: &'a Engine,
    spec: &'a BuildSpec,
    plan: Plan,
    watcher: &'a mut dyn BuildWatcher,
    cancel: &'a Cancel,
    store: Store,
    /// Of stages that are done, the key of the last layer; none inside if nothing was done to the base.
    tops: Vec<Option<Option<String>>>,
    /// Sandboxes that run: of stages, by position, and of images that are copied from, after those.
    machines: BTreeMap<usize, Machine>,
    /// All sandboxes that were made.
    names: Vec<SandboxName>,
    /// Keys of layers that this build has made.
    made: HashSet<String>,
    /// Number of the first step of each stage.
    first: Vec<usize>,
    total: usize,
    ran: usize,
    cached: usize,
}

impl Build<'_> {
    async fn image(&mut self) -> Result<BuiltImage> {
        let last = self.plan.stages.len() - 1;
        let top = self.complete(last).await?;
        let stage = &self.plan.stages[last];
        let name: ImageName = match &self.spec.name {
            Some(name) => name.clone(),
            None => format!("build:{}", &stage.end()[..12]).parse()?,
        };
        let source = format!(
            "built from {} in {}",
            self.spec.file.0.name,
            self.spec.context.display()
        );
        let published = match self.known(top.as_deref(), &name, &source)? {
            Some(published) => published,
            None => self.commit(top.as_deref(), &name, source).await?,
        };
        Ok(BuiltImage {
            image: published.image.into(),
            replaced: published.replaced,
            ran: self.ran,
            cached: self.cached,
            warnings: self.plan.warnings.clone(),
        })
    }

    /// Names the root file system, if it is there already.
    fn known(
        &mut self,
        top: Option<&str>,
        name: &ImageName,
        source: &str,
    ) -> Result<Option<Published>> {
        let Some(stage) = self.plan.stages.last() else {
            return Ok(None);
        };
        let digest = match top {
            None => Some(stage.root.digest.clone()),
            Some(key) => self
                .store
                .build_layer(key)?
                .and_then(|layer| layer.image_digest),
        };
        let Some(digest) = digest else {
            return Ok(None);
        };
        let assets = self.engine.assets();
        assets.name_root(&mut self.store, name, &digest, source, &stage.config)
    }

    /// Has the last stage's guest read its root, and writes an image of it.
    async fn commit(
        &mut self,
        top: Option<&str>,
        name: &ImageName,
        source: String,
    ) -> Result<Published> {
        let last = self.plan.stages.len() - 1;
        self.machine(last).await?;
        let stage = &self.plan.stages[last];
        let machine = &self.machines[&last];
        let base = self.engine.layout().image(&stage.root.digest);
        let base = std::fs::metadata(base.join("root.erofs")).map_or(0, |root| root.len());
        let expected = expected_over(base, &machine.session).await?;
        let what = Receive {
            image: name,
            source,
            config: stage.config.clone(),
            pause: true,
            expected,
        };
        let never = std::future::pending();
        let received = self
            .engine
            .receive(&machine.session, what, self.watcher, never);
        let staged = machine.session.unless_hung(received).await?;
        let digest = staged.manifest.digest.clone();
        let assets = self.engine.assets();
        let published = assets.publish_image(&mut self.store, staged, name, true)?;
        if let Some(key) = top {
            self.store.set_build_image(key, &digest)?;
        }
        Ok(published)
    }

    fn show(&mut self, number: usize, text: &str, cached: bool) {
        self.watcher.step(&BuildStep {
            number,
            total: self.total,
            text,
            cached,
        });
    }

    /// A layer that is kept and can be gone on from.
    fn kept(&self, key: &str) -> Result<Option<BuildLayerRow>> {
        if !(self.spec.cached || self.made.contains(key)) {
            return Ok(None);
        }
        let layer = self.store.build_layer(key)?;
        Ok(layer.filter(|layer| {
            layer.disk_mib >= self.spec.disk_mib && self.engine.assets().layer_disk(key).exists()
        }))
    }

    /// Has every step of a stage done. Returns the key of its last layer.
    async fn complete(&mut self, at: usize) -> Result<Option<String>> {
        if let Some(top) = &self.tops[at] {
            return Ok(top.clone());
        }
        let stage = &self.plan.stages[at];
        let mut from = 0;
        let mut top = None;
        for (index, step) in stage.steps.iter().enumerate().rev() {
            if let Some((key, _)) = &step.action
                && self.kept(key)?.is_some()
            {
                from = index + 1;
                top = Some(key.clone());
                break;
            }
        }
        if top.is_none()
            && let Some(parent) = stage.parent
        {
            top = Box::pin(self.complete(parent)).await?;
        }
        // First what its steps copy from, so that what is shown is in order.
        for index in from..self.plan.stages[at].steps.len() {
            if let Some((
                _,
                Action::CopyFrom {
                    from: Origin::Stage(other),
                    ..
                },
            )) = &self.plan.stages[at].steps[index].action
            {
                let other = *other;
                Box::pin(self.complete(other)).await?;
            }
        }
        let stage = &self.plan.stages[at];
        let first = self.first[at];
        let text = stage.text.clone();
        let shown: Vec<(String, bool)> = stage
            .steps
            .iter()
            .map(|step| (step.text.clone(), step.action.is_some()))
            .collect();
        self.show(first, &text, false);
        for (index, (text, does)) in shown.iter().enumerate().take(from) {
            self.show(first + 1 + index, text, *does);
            self.cached += usize::from(*does);
        }
        for (index, (text, does)) in shown.iter().enumerate().skip(from) {
            self.show(first + 1 + index, text, false);
            if !does {
                continue;
            }
            if !self.machines.contains_key(&at) {
                let network = self.network_of(at, index);
                let root = self.plan.stages[at].root.clone();
                let machine = self.start(&root, top.as_deref(), network).await?;
                self.machines.insert(at, machine);
            }
            let key = self.step(at, index).await?;
            self.ran += 1;
            top = Some(key);
        }
        self.tops[at] = Some(top.clone());
        // A machine that runs is kept for those who copy from it.
        let last = at + 1 == self.plan.stages.len();
        if !last && !self.is_copied_from(at) {
            self.end(at).await;
        }
        Ok(top)
    }

    fn is_copied_from(&self, at: usize) -> bool {
        self.plan.stages[at + 1..].iter().any(|stage| {
            stage.steps.iter().any(|step| {
                matches!(
                    &step.action,
                    Some((_, Action::CopyFrom { from: Origin::Stage(from), .. })) if *from == at
                )
            })
        })
    }

    /// The network that steps of a stage need from one on: none, where no command runs.
    fn network_of(&self, at: usize, from: usize) -> NetworkSpec {
        let steps = &self.plan.stages[at].steps[from..];
        let runs = steps
            .iter()
            .any(|step| matches!(step.action, Some((_, Action::Run(_)))));
        if runs {
            self.spec.network.clone()
        } else {
            NetworkSpec::off()
        }
    }

    /// A sandbox in which everything of a stage is done.
    async fn machine(&mut self, at: usize) -> Result<()> {
        let top = Box::pin(self.complete(at)).await?;
        if !self.machines.contains_key(&at) {
            let root = self.plan.stages[at].root.clone();
            let machine = self
                .start(&root, top.as_deref(), NetworkSpec::off())
                .await?;
            self.machines.insert(at, machine);
        }
        Ok(())
    }

    /// Starts a sandbox of an image, with a layer over it.
    async fn start(
        &mut self,
        root: &Base,
        top: Option<&str>,
        network: NetworkSpec,
    ) -> Result<Machine> {
        let engine = self.engine;
        let kernel = &self.spec.kernel;
        let missing = engine.missing_assets(&root.name, kernel, network.needs_device())?;
        if !missing.is_empty() {
            engine.prepare(&root.name, kernel, self.watcher, self.cancel)?;
        }
        let layer = match top {
            Some(key) => Some(self.store.build_layer(key)?.ok_or_else(layer_gone)?),
            None => None,
        };
        let name: SandboxName = format!("build-{:08x}", random_u64()? >> 32).parse()?;
        let disk_mib = layer
            .as_ref()
            .map_or(self.spec.disk_mib, |layer| layer.disk_mib);
        let spec = SandboxSpec {
            image: root.name.clone(),
            cpus: self.spec.cpus,
            memory_mib: self.spec.memory_mib,
            disk_mib,
            disk_mode: DiskMode::Isolated,
            network,
            ephemeral: true,
            kernel: kernel.clone(),
            ..SandboxSpec::new(name.clone())
        };
        spec.check()?;
        let key = engine.kernel_for(&spec)?;
        // Written down first: from now on there may be something to remove.
        self.names.push(name.clone());
        let row = engine.insert(&mut self.store, &spec, root.digest.clone(), key, None)?;
        let disk = engine.layout().sandbox(&row.id).disk();
        if let Some(layer) = layer {
            let kept = engine.assets().layer_disk(&layer.key);
            let copied = engine
                .os()
                .copy_sparse("make the sandbox's disk", &kept, &disk);
            if let Err(error) = copied {
                return Err(if kept.exists() {
                    error.into()
                } else {
                    layer_gone()
                });
            }
        }
        let beginning = Beginning {
            // It is started once: to make a template of it would cost more than it saves.
            plain: true,
            ..Beginning::default()
        };
        let (session, _) = engine
            .start_with(name.as_str(), &beginning)
            .await
            .map_err(without_network)?;
        session.own().await?;
        Ok(Machine {
            name,
            session,
            disk,
            disk_mib,
        })
    }

    /// Carries one step out, and keeps its layer. Returns its key.
    async fn step(&mut self, at: usize, index: usize) -> Result<String> {
        let step = &self.plan.stages[at].steps[index];
        let (place, text) = (step.place.clone(), step.text.clone());
        let Some((key, action)) = &step.action else {
            return Err(Error::new(
                ErrorKind::Internal,
                "a step that does nothing was to run",
            ));
        };
        let key = key.clone();
        if let Action::CopyFrom { from, .. } = action {
            let from = from.clone();
            self.source(&from).await?;
        }
        let Some((_, action)) = &self.plan.stages[at].steps[index].action else {
            return Ok(key);
        };
        let machine = &self.machines[&at];
        let session = &machine.session;
        let done = match action {
            Action::Run(run) => command(session, run, self.watcher, &text).await,
            Action::Copy { found, to } => {
                let into = to.directory || session.is_directory(&to.path).await?;
                let mut done = Ok(());
                for one in found {
                    let (directory, name) = match one.kind {
                        FoundKind::File => to.of_file(into, one.name.clone()),
                        FoundKind::Directory | FoundKind::Archive => {
                            (to.path.clone(), OsString::new())
                        }
                    };
                    let owner = match (&to.owner, one.kind) {
                        // An archive says itself whose its files are.
                        (None, FoundKind::Archive) => None,
                        (owner, _) => Some(owner.as_deref().unwrap_or(ROOT)),
                    };
                    let (one, chmod) = (one.clone(), to.chmod);
                    let put =
                        session.put(&directory, owner, move |out| one.pack(&name, chmod, out));
                    done = session.unless_hung(put).await;
                    if done.is_err() {
                        break;
                    }
                }
                done
            }
            Action::CopyFrom { from, sources, to } => {
                let from = &self.machines[&self.slot(from)].session;
                copy_from(from, session, sources, to).await
            }
            Action::Directory { path, owner } => {
                let put = session.put(path, owner.as_deref(), |out| {
                    tar::Builder::new(out)
                        .finish()
                        .map_err(|error| io("could not make the directory", error))
                });
                session.unless_hung(put).await
            }
        };
        let file = &self.spec.file.0.name;
        done.map_err(|error| at_place(file, &place, &text, error))?;
        self.keep(at, &key, text).await?;
        Ok(key)
    }

    /// Where the sandbox of an origin is among the machines.
    fn slot(&self, from: &Origin) -> usize {
        match from {
            Origin::Stage(at) => *at,
            Origin::Image(image) => {
                let stages = self.plan.stages.len();
                // Images after the stages, by the first step that copies from them.
                let images = self.plan.stages.iter().flat_map(|stage| &stage.steps);
                let position = images
                    .filter_map(|step| match &step.action {
                        Some((
                            _,
                            Action::CopyFrom {
                                from: Origin::Image(image),
                                ..
                            },
                        )) => Some(image),
                        _ => None,
                    })
                    .position(|known| known.digest == image.digest);
                stages + position.unwrap_or(0)
            }
        }
    }

    /// Has a sandbox to copy from.
    async fn source(&mut self, from: &Origin) -> Result<()> {
        match from {
            Origin::Stage(at) => self.machine(*at).await,
            Origin::Image(image) => {
                let slot = self.slot(from);
                if !self.machines.contains_key(&slot) {
                    let machine = self.start(image, None, NetworkSpec::off()).await?;
                    self.machines.insert(slot, machine);
                }
                Ok(())
            }
        }
    }

    /// Keeps the layer of a sandbox as it is now.
    async fn keep(&mut self, at: usize, key: &str, step: String) -> Result<()> {
        let machine = &self.machines[&at];
        machine.session.settle().await?;
        let name = machine.name.as_str();
        // Nothing but the kernel itself could write now, and that must not either.
        self.engine.pause(name).await?;
        let copied = self.engine.assets().copy_layer(&machine.disk);
        self.engine.resume(name).await?;
        let row = BuildLayerRow {
            key: key.to_owned(),
            base_digest: self.plan.stages[at].root.digest.clone(),
            disk_mib: machine.disk_mib,
            step,
            image_digest: None,
            created_at: Timestamp::now(),
        };
        self.engine
            .assets()
            .keep_layer(&mut self.store, &copied?, &row)?;
        self.made.insert(key.to_owned());
        Ok(())
    }

    /// Ends the sandbox of a stage.
    async fn end(&mut self, at: usize) {
        if let Some(machine) = self.machines.remove(&at) {
            remove(self.engine, &machine.name).await;
            self.names.retain(|name| *name != machine.name);
        }
    }

    /// Ends all sandboxes.
    async fn clean_up(&mut self) {
        for name in std::mem::take(&mut self.names) {
            remove(self.engine, &name).await;
        }
        // Their connections last: what they own goes with them.
        self.machines.clear();
    }
}

async fn remove(engine: &Engine, name: &SandboxName) {
    match engine.delete(name.as_str()).await {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            tracing::warn!(%error, %name, "its keeper removes it");
        }
        _ => {}
    }
}

impl Destination {
    /// Directory and name of a file that goes there.
    fn of_file(&self, into: bool, own: OsString) -> (String, OsString) {
        if into {
            return (self.path.clone(), own);
        }
        match self.path.rsplit_once('/') {
            Some(("", name)) => ("/".to_owned(), name.into()),
            Some((directory, name)) => (directory.to_owned(), name.into()),
            None => (self.path.clone(), own),
        }
    }
}

/// Runs a command to its end.
async fn command(
    session: &Session,
    run: &RunAction,
    watcher: &mut dyn BuildWatcher,
    text: &str,
) -> Result<()> {
    let mut argv: Vec<OsString> = run.argv.iter().map(OsString::from).collect();
    if let Some(script) = &run.script {
        let found = super::Found::inline(SCRIPT_NAME, script.clone());
        let put = session.put(SCRIPT_DIR, Some(ROOT), move |out| {
            found.pack(SCRIPT_NAME.as_ref(), Some(0o755), out)
        });
        session.unless_hung(put).await?;
        argv.push(format!("{SCRIPT_DIR}/{SCRIPT_NAME}").into());
    }
    let spec = ExecSpec {
        env: run.env.clone(),
        workdir: Some(run.workdir.clone()),
        user: run.user.clone(),
        ..ExecSpec::new(argv)
    };
    let mut exec = session.exec(&spec).await?;
    let status = loop {
        match exec.next().await? {
            ExecEvent::Stdout(bytes) => watcher.output(&bytes, false),
            ExecEvent::Stderr(bytes) => watcher.output(&bytes, true),
            ExecEvent::Exited(status) => break status,
        }
    };
    if status.code == Some(0) {
        return Ok(());
    }
    let how = match (status.code, status.signal) {
        (Some(code), _) => format!("`{text}` ended with exit code {code}"),
        (None, Some(signal)) => format!("`{text}` was killed by signal {signal}"),
        (None, None) => format!("`{text}` ended, and nobody knows how"),
    };
    let error = Error::new(ErrorKind::GuestFailed, how);
    let room = session.facts().await.map(|facts| facts.disk_free_bytes);
    Err(match (room, status.signal) {
        (Ok(room), _) if room < LITTLE_BYTES => {
            error.hint("the disk is full: give the build more room with --disk")
        }
        (_, Some(9)) => error.hint("if it ran out of memory, give the build more with --memory"),
        _ => error.hint("what it said is above; the steps before it are kept for the next build"),
    })
}

/// Copies from one guest to another.
async fn copy_from(
    from: &Session,
    session: &Session,
    sources: &[String],
    to: &Destination,
) -> Result<()> {
    let mut paths = Vec::new();
    for source in sources {
        paths.extend(guest_paths(from, source).await?);
    }
    let into = to.directory || paths.len() > 1 || session.is_directory(&to.path).await?;
    for path in paths {
        let (directory, name) = if from.is_directory(&path).await? {
            (to.path.clone(), None)
        } else {
            let own = path.rsplit('/').next().unwrap_or_default();
            let (directory, name) = to.of_file(into, own.into());
            (directory, Some(name))
        };
        let copy = CopyTo {
            directory,
            name,
            owner: to.owner.clone(),
            chmod: to.chmod,
        };
        session
            .unless_hung(from.copy_to(&path, session, copy))
            .await?;
    }
    Ok(())
}

/// The paths of a guest that a source means.
async fn guest_paths(session: &Session, source: &str) -> Result<Vec<String>> {
    let pattern = Pattern::parse(source).map_err(|why| Error::new(ErrorKind::InvalidInput, why))?;
    let prefix = pattern.plain_prefix().join("/");
    if pattern.is_plain() {
        return Ok(vec![format!("/{prefix}")]);
    }
    let mut found = Vec::new();
    let mut directories = vec![prefix];
    while let Some(directory) = directories.pop() {
        for file in session.list_dir(&format!("/{directory}"), false).await? {
            let path = format!("{directory}/{}", file.name);
            let path = path.trim_start_matches('/').to_owned();
            if pattern.matches(&path) {
                found.push(format!("/{path}"));
            } else if file.kind == FileKind::Directory
                && pattern
                    .depth()
                    .is_none_or(|depth| path.split('/').count() < depth)
            {
                directories.push(path);
            }
        }
    }
    if found.is_empty() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("nothing there is called `{}`", source.escape_debug()),
        ));
    }
    found.sort();
    Ok(found)
}

/// Says where in the file a failure belongs.
fn at_place(file: &str, place: &Place, text: &str, error: Error) -> Error {
    let kind = error.kind();
    let hint = error.hint_text().map(ToOwned::to_owned);
    let wrapped = if kind == ErrorKind::GuestFailed && error.console_lines().is_empty() {
        mistake(file, place, error)
    } else {
        mistake(file, place, format!("`{text}` could not be carried out")).because(error)
    }
    .with_kind(kind);
    match hint {
        Some(hint) => wrapped.hint(hint),
        None => wrapped,
    }
}

/// A build without a network is better than none.
fn without_network(error: Error) -> Error {
    let denied = error.kind() == ErrorKind::PermissionDenied;
    if denied && !rustix::process::geteuid().is_root() {
        error.hint("build without a network, with --network off, or as root")
    } else {
        error
    }
}
