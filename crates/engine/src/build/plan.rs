//! What a build has to do: which stages, in which order, and for each step its key.
//!
//! A key says everything that a step's outcome depends on: the key of what it is done to, the step
//! itself, the variables it sees, and the content it copies. All keys are known before anything runs,
//! so that what cannot be (a file that is not there, a stage that nobody has) is known before, too.

use std::collections::{BTreeMap, BTreeSet};

use smolvm_host::oci::{ImageConfig, Platform};

use super::context::{Found, Hasher};
use super::dockerfile::{
    Command, Copy, Dockerfile, Instruction, Place, Run, Source, Stage, Step, mistake,
};
use super::words;
use crate::error::{Error, ErrorKind, Result};
use crate::spec::check_env;

/// The shell of commands in their shell form.
const SHELL: [&str; 2] = ["/bin/sh", "-c"];

/// The image that has nothing in it.
pub(super) const SCRATCH: &str = "scratch";

/// Arguments that a build may be given without naming them in the file, and that count for no key.
const PROXIES: [&str; 5] = [
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "FTP_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
];

/// What is looked up while a build is planned.
pub(super) trait Sources {
    /// The image of this name, brought if need be.
    fn image(&mut self, name: &str) -> Result<Base>;
    /// The files of the context that a source means.
    fn find(&mut self, source: &str, unpack: bool) -> Result<Vec<Found>>;
}

/// An image to begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Base {
    pub(super) name: String,
    pub(super) digest: String,
    pub(super) config: ImageConfig,
}

/// What the user chose.
#[derive(Debug, Clone, Default)]
pub(super) struct Choices<'a> {
    /// Values of arguments, the last of a name counting.
    pub(super) args: &'a [(String, String)],
    /// The stage to build; the last one if absent.
    pub(super) target: Option<&'a str>,
}

/// All that is to be done.
#[derive(Debug)]
pub(super) struct Plan {
    /// The stages that are needed, each after those it needs; the last one is the image.
    pub(super) stages: Vec<PlannedStage>,
    pub(super) warnings: Vec<String>,
}

/// A stage that is needed.
#[derive(Debug)]
pub(super) struct PlannedStage {
    /// `FROM`, as it is written.
    pub(super) text: String,
    /// The image under everything.
    pub(super) root: Base,
    /// The stage it goes on from, by its position in [`Plan::stages`].
    pub(super) parent: Option<usize>,
    pub(super) steps: Vec<PlannedStep>,
    /// What the image is to say of its commands.
    pub(super) config: ImageConfig,
    /// Key of everything that is done before its own first step.
    start: String,
    shell: Vec<String>,
}

impl PlannedStage {
    /// Key of the stage with everything done.
    pub(super) fn end(&self) -> &str {
        self.steps
            .iter()
            .rev()
            .find_map(|step| step.action.as_ref().map(|(key, _)| key.as_str()))
            .unwrap_or(&self.start)
    }
}

/// An instruction.
#[derive(Debug)]
pub(super) struct PlannedStep {
    pub(super) place: Place,
    pub(super) text: String,
    /// What it does to the file system, and the key of the outcome; nothing if it only says something
    /// of commands.
    pub(super) action: Option<(String, Action)>,
}

/// Something done to a file system.
#[derive(Debug)]
pub(super) enum Action {
    Run(RunAction),
    /// Puts files of the context into the guest.
    Copy {
        found: Vec<Found>,
        to: Destination,
    },
    /// Puts files of another stage or image there.
    CopyFrom {
        from: Origin,
        sources: Vec<String>,
        to: Destination,
    },
    /// Makes a directory if it is not there.
    Directory {
        path: String,
        owner: Option<String>,
    },
}

/// A command with all it sees.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct RunAction {
    pub(super) argv: Vec<String>,
    /// A script that is the last of `argv`'s words.
    pub(super) script: Option<String>,
    pub(super) env: Vec<(String, String)>,
    pub(super) workdir: String,
    pub(super) user: Option<String>,
}

/// Where files go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Destination {
    /// Absolute, without a slash at its end but for the root's.
    pub(super) path: String,
    /// Whether it is said to be a directory.
    pub(super) directory: bool,
    /// `USER[:GROUP]`, as the guest knows them.
    pub(super) owner: Option<String>,
    /// Permission bits.
    pub(super) chmod: Option<u32>,
}

/// Where files come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// A stage, by its position in [`Plan::stages`].
    Stage(usize),
    Image(Box<Base>),
}

/// Plans a build.
///
/// # Errors
///
/// [`ErrorKind::InvalidInput`] and others, with the place in the file, for what cannot be done.
pub(super) fn plan(
    file: &Dockerfile,
    choices: &Choices<'_>,
    sources: &mut dyn Sources,
) -> Result<Plan> {
    let mut planner = Planner {
        file,
        given: choices
            .args
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect(),
        used: BTreeSet::new(),
        globals: platform_args(),
        sources,
        planned: BTreeMap::new(),
        stages: Vec::new(),
    };
    planner.global_args()?;
    let target = planner.target(choices.target)?;
    for index in planner.needed(target)? {
        planner.stage(index)?;
    }
    let mut warnings = file.warnings.clone();
    let unused = planner
        .given
        .keys()
        .filter(|name| !planner.used.contains(**name) && !is_proxy(name));
    warnings.extend(
        unused.map(|name| format!("nothing in {} uses the build argument `{name}`", file.name)),
    );
    Ok(Plan {
        stages: planner.stages,
        warnings,
    })
}

fn is_proxy(name: &str) -> bool {
    PROXIES.contains(&name.to_ascii_uppercase().as_str())
}

/// "Automatic platform ARGs in the global scope".
fn platform_args() -> BTreeMap<String, Option<String>> {
    let platform = Platform::of_guests();
    let mut args = BTreeMap::new();
    for side in ["TARGET", "BUILD"] {
        let mut put = |name: &str, value: &str| {
            args.insert(format!("{side}{name}"), Some(value.to_owned()));
        };
        put("PLATFORM", &platform.to_string());
        put("OS", &platform.os);
        put("ARCH", &platform.architecture);
        put("VARIANT", platform.variant.as_deref().unwrap_or_default());
    }
    args
}

struct Planner<'a> {
    file: &'a Dockerfile,
    given: BTreeMap<&'a str, &'a str>,
    /// Given arguments that some instruction names.
    used: BTreeSet<&'a str>,
    /// Arguments before the first stage.
    globals: BTreeMap<String, Option<String>>,
    sources: &'a mut dyn Sources,
    /// Where the stages of the file are among those that are planned.
    planned: BTreeMap<usize, usize>,
    stages: Vec<PlannedStage>,
}

impl<'a> Planner<'a> {
    fn wrong(&self, place: &Place, what: impl std::fmt::Display) -> Error {
        mistake(&self.file.name, place, what)
    }

    fn expand(&self, place: &Place, word: &str, lookup: words::Lookup<'_>) -> Result<String> {
        words::expand(word, self.file.escape, lookup).map_err(|what| self.wrong(place, what))
    }

    /// The value an argument was given.
    fn given(&mut self, name: &str) -> Option<String> {
        let (known, value) = self.given.get_key_value(name)?;
        self.used.insert(known);
        Some((*value).to_owned())
    }

    fn global_args(&mut self) -> Result<()> {
        for step in &self.file.args {
            let Instruction::Arg(args) = &step.what else {
                continue;
            };
            for (name, default) in args {
                let value = match self.given(name) {
                    Some(given) => Some(given),
                    None => match default {
                        Some(default) => Some(self.expand(&step.place, default, &|name| {
                            self.globals.get(name).cloned().flatten()
                        })?),
                        // One of those that are there by themselves keeps what it has.
                        None => self.globals.get(name).cloned().flatten(),
                    },
                };
                self.globals.insert(name.clone(), value);
            }
        }
        Ok(())
    }

    fn target(&self, target: Option<&str>) -> Result<usize> {
        let stages = &self.file.stages;
        let Some(target) = target else {
            return Ok(stages.len() - 1);
        };
        self.stage_named(target, stages.len()).ok_or_else(|| {
            let names: Vec<_> = stages
                .iter()
                .filter_map(|stage| stage.name.as_deref())
                .collect();
            let error = Error::new(
                ErrorKind::NotFound,
                format!(
                    "{} has no stage `{}`",
                    self.file.name,
                    target.escape_debug()
                ),
            );
            if names.is_empty() {
                error.hint("name a stage with FROM IMAGE AS NAME, or give its number, from 0")
            } else {
                error.hint(format!("its stages are {}", names.join(", ")))
            }
        })
    }

    /// A stage before `before` by its name or number.
    fn stage_named(&self, name: &str, before: usize) -> Option<usize> {
        let lower = name.to_ascii_lowercase();
        let stages = &self.file.stages[..before];
        stages
            .iter()
            .position(|stage| stage.name.as_deref() == Some(&lower))
            .or_else(|| name.parse().ok().filter(|number| *number < before))
    }

    fn base(&self, stage: &Stage) -> Result<String> {
        let lookup = |name: &str| self.globals.get(name).cloned().flatten();
        let base = self.expand(&stage.place, &stage.base, &lookup)?;
        if base.is_empty() {
            return Err(self
                .wrong(&stage.place, format!("`{}` comes to nothing", stage.base))
                .hint("give the argument a value with --build-arg, or a default in its ARG"));
        }
        if let Some(platform) = &stage.platform {
            let platform = self.expand(&stage.place, platform, &lookup)?;
            let ours = Platform::of_guests().to_string();
            if !(platform.is_empty() || platform == ours) {
                let what = format!("`--platform={platform}` is not that of guests here, {ours}");
                return Err(self
                    .wrong(&stage.place, what)
                    .with_kind(ErrorKind::Unsupported));
            }
        }
        Ok(base)
    }

    /// The stages that a stage needs, and itself last.
    fn needed(&self, target: usize) -> Result<Vec<usize>> {
        let mut needed = BTreeSet::from([target]);
        // Each needs only earlier ones.
        for index in (0..=target).rev() {
            if !needed.contains(&index) {
                continue;
            }
            let stage = &self.file.stages[index];
            needed.extend(self.stage_of_base(index, &self.base(stage)?));
            for step in &stage.steps {
                if let Instruction::Copy(Copy {
                    from: Some(from), ..
                }) = &step.what
                {
                    needed.extend(self.stage_named(from, index));
                }
            }
        }
        Ok(needed.into_iter().collect())
    }

    /// A stage that is a base; by name only.
    fn stage_of_base(&self, index: usize, base: &str) -> Option<usize> {
        let lower = base.to_ascii_lowercase();
        self.file.stages[..index]
            .iter()
            .position(|stage| stage.name.as_deref() == Some(&lower))
    }

    fn image(&mut self, place: &Place, name: &str) -> Result<Base> {
        self.sources.image(name).map_err(|error| {
            let kind = error.kind();
            let hint = error.hint_text().map(ToOwned::to_owned);
            let what = format!("the image `{}` is not to be had", name.escape_debug());
            let wrapped = self.wrong(place, what).with_kind(kind).because(error);
            match hint {
                Some(hint) => wrapped.hint(hint),
                None => wrapped,
            }
        })
    }

    fn stage(&mut self, index: usize) -> Result<()> {
        let stage: &'a Stage = &self.file.stages[index];
        let base = self.base(stage)?;
        let parent = self
            .stage_of_base(index, &base)
            .and_then(|parent| self.planned.get(&parent).copied());
        let (root, start, config, shell) = match parent.map(|parent| &self.stages[parent]) {
            Some(parent) => (
                parent.root.clone(),
                parent.end().to_owned(),
                parent.config.clone(),
                parent.shell.clone(),
            ),
            None => {
                let image = self.image(&stage.place, &base)?;
                let mut hash = Hasher::new("image");
                hash.text(&image.digest);
                let config = image.config.clone();
                let shell = SHELL.iter().map(|&word| word.to_owned()).collect();
                (image, hash.finish(), config, shell)
            }
        };
        let mut state = StageState {
            key: start.clone(),
            config,
            shell,
            args: BTreeMap::new(),
            cmd_set: false,
        };
        let mut steps = Vec::new();
        for step in &stage.steps {
            let action = self.step(index, &mut state, step)?;
            if let Some((key, _)) = &action {
                state.key.clone_from(key);
            }
            steps.push(PlannedStep {
                place: step.place.clone(),
                text: step.text.clone(),
                action,
            });
        }
        self.planned.insert(index, self.stages.len());
        self.stages.push(PlannedStage {
            text: stage.text.clone(),
            root,
            parent,
            steps,
            config: state.config,
            start,
            shell: state.shell,
        });
        Ok(())
    }

    fn step(
        &mut self,
        index: usize,
        state: &mut StageState,
        step: &Step,
    ) -> Result<Option<(String, Action)>> {
        let place = &step.place;
        let checked = |planner: &Self, name: &str, value: &str| {
            check_env(name, value).map_err(|error| planner.wrong(place, error))
        };
        match &step.what {
            Instruction::Env(pairs) => {
                let mut values = Vec::new();
                for (name, value) in pairs {
                    let name = self.expand(place, name, &|name| state.lookup(name))?;
                    let value = self.expand(place, value, &|name| state.lookup(name))?;
                    checked(self, &name, &value)?;
                    values.push((name, value));
                }
                for (name, value) in values {
                    state.set_env(name, value);
                }
            }
            Instruction::Arg(args) => {
                for (name, default) in args {
                    let value = match (self.given(name), default) {
                        (Some(given), _) => Some(given),
                        (None, Some(default)) => {
                            Some(self.expand(place, default, &|name| state.lookup(name))?)
                        }
                        (None, None) => self.globals.get(name).cloned().flatten(),
                    };
                    if let Some(value) = value {
                        checked(self, name, &value)?;
                        state.args.insert(name.clone(), value);
                    }
                }
            }
            Instruction::Label(pairs) => {
                for (name, value) in pairs {
                    let name = self.expand(place, name, &|name| state.lookup(name))?;
                    let value = self.expand(place, value, &|name| state.lookup(name))?;
                    state.config.labels.retain(|(known, _)| *known != name);
                    state.config.labels.push((name, value));
                }
            }
            Instruction::Expose(ports) => {
                for port in ports {
                    let port = self.expand(place, port, &|name| state.lookup(name))?;
                    for port in exposed(&port).ok_or_else(|| {
                        self.wrong(place, format!("`{}` is no port", port.escape_debug()))
                            .hint("write it as 80, 80/tcp, 53/udp or 8000-8010")
                    })? {
                        if !state.config.ports.contains(&port) {
                            state.config.ports.push(port);
                        }
                    }
                }
            }
            Instruction::Shell(words) => state.shell.clone_from(words),
            Instruction::Cmd(command) => {
                state.config.cmd = state.words(command);
                state.cmd_set = true;
            }
            Instruction::Entrypoint(command) => {
                state.config.entrypoint = state.words(command);
                // What the base runs by itself is no argument of another program.
                if !state.cmd_set {
                    state.config.cmd.clear();
                }
            }
            Instruction::User(user) => {
                let user = self.expand(place, user, &|name| state.lookup(name))?;
                if user.is_empty() {
                    return Err(self.wrong(place, "`USER` comes to nothing"));
                }
                state.config.user = Some(user);
            }
            Instruction::Workdir(path) => {
                let path = self.expand(place, path, &|name| state.lookup(name))?;
                if path.is_empty() {
                    return Err(self.wrong(place, "`WORKDIR` comes to nothing"));
                }
                let path = guest_path(state.workdir(), &path);
                state.config.workdir = Some(path.clone());
                if path != "/" {
                    let owner = state.config.user.clone();
                    let mut hash = state.begin("directory");
                    hash.text(&path);
                    hash.text(owner.as_deref().unwrap_or_default());
                    return Ok(Some((hash.finish(), Action::Directory { path, owner })));
                }
            }
            Instruction::Run(run) => return Ok(Some(self.run(state, run))),
            Instruction::Copy(copy) => return self.copy(index, state, place, copy).map(Some),
        }
        Ok(None)
    }

    fn run(&self, state: &StageState, run: &Run) -> (String, Action) {
        let (argv, script) = match run {
            Run::Command(command) => (state.words(command), None),
            Run::Script(text) => (Vec::new(), Some(text.clone())),
        };
        let mut env: Vec<(String, String)> = state
            .args
            .iter()
            .filter(|(name, _)| state.env(name).is_none())
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        env.extend(state.config.env.iter().cloned());
        let workdir = state.workdir().to_owned();
        let user = state.config.user.clone();
        let mut hash = state.begin("run");
        hash.part(&(argv.len() as u64).to_le_bytes());
        for word in &argv {
            hash.text(word);
        }
        hash.text(script.as_deref().unwrap_or_default());
        hash.part(&(env.len() as u64).to_le_bytes());
        for (name, value) in &env {
            hash.text(name);
            hash.text(value);
        }
        hash.text(&workdir);
        hash.text(user.as_deref().unwrap_or_default());
        // How the network is reached makes no other image.
        for (name, value) in &self.given {
            if is_proxy(name) && !env.iter().any(|(known, _)| known == name) {
                env.push(((*name).to_owned(), (*value).to_owned()));
            }
        }
        let action = Action::Run(RunAction {
            argv,
            script,
            env,
            workdir,
            user,
        });
        (hash.finish(), action)
    }

    fn copy(
        &mut self,
        index: usize,
        state: &StageState,
        place: &Place,
        copy: &Copy,
    ) -> Result<(String, Action)> {
        let expand =
            |planner: &Self, word: &str| planner.expand(place, word, &|name| state.lookup(name));
        let dest = expand(self, &copy.dest)?;
        if dest.is_empty() {
            return Err(self.wrong(place, "the destination comes to nothing"));
        }
        let owner = match &copy.chown {
            Some(chown) => Some(expand(self, chown)?).filter(|owner| !owner.is_empty()),
            None => None,
        };
        let mut paths = Vec::new();
        for source in &copy.sources {
            if let Source::Path(path) = source {
                paths.push(expand(self, path)?);
            }
        }
        let last = dest.rsplit('/').next().unwrap_or_default();
        let mut to = Destination {
            path: guest_path(state.workdir(), &dest),
            directory: ["", ".", ".."].contains(&last),
            owner,
            chmod: copy.chmod,
        };
        if let Some(from) = &copy.from {
            if paths.len() < copy.sources.len() {
                return Err(self.wrong(place, "a here-document comes from no stage"));
            }
            to.directory |= paths.len() > 1;
            let (from, key) = self.origin(index, place, from)?;
            let mut hash = state.begin("copy from");
            hash.text(&key);
            hash.part(&(paths.len() as u64).to_le_bytes());
            for path in &paths {
                hash.text(path);
            }
            to.hash(&mut hash);
            let action = Action::CopyFrom {
                from,
                sources: paths,
                to,
            };
            return Ok((hash.finish(), action));
        }
        let mut found = Vec::new();
        let mut paths = paths.into_iter();
        for source in &copy.sources {
            match source {
                Source::Path(_) => {
                    let path = paths.next().unwrap_or_default();
                    let more = self.sources.find(&path, copy.add).map_err(|error| {
                        let (kind, text) = (error.kind(), error.in_one_line());
                        let hint = error.hint_text().unwrap_or_default().to_owned();
                        let error = self.wrong(place, text).with_kind(kind);
                        if hint.is_empty() {
                            error
                        } else {
                            error.hint(hint)
                        }
                    })?;
                    found.extend(more);
                }
                Source::Inline(document) => {
                    let text = if document.expand {
                        expand_document(&document.text, self.file.escape, &|name| {
                            state.lookup(name)
                        })
                        .map_err(|what| self.wrong(place, what))?
                    } else {
                        document.text.clone()
                    };
                    found.push(Found::inline(&document.name, text));
                }
            }
        }
        to.directory |= found.len() > 1;
        let mut hash = state.begin("copy");
        hash.part(&(found.len() as u64).to_le_bytes());
        for one in &found {
            one.hash(&mut hash);
        }
        to.hash(&mut hash);
        Ok((hash.finish(), Action::Copy { found, to }))
    }

    /// What `--from` means, and what it is known by.
    fn origin(&mut self, index: usize, place: &Place, from: &str) -> Result<(Origin, String)> {
        if let Some(stage) = self.stage_named(from, index)
            && let Some(at) = self.planned.get(&stage)
        {
            return Ok((Origin::Stage(*at), self.stages[*at].end().to_owned()));
        }
        let image = self.image(place, from)?;
        let key = image.digest.clone();
        Ok((Origin::Image(Box::new(image)), key))
    }
}

impl Destination {
    fn hash(&self, hash: &mut Hasher) {
        hash.text(&self.path);
        hash.part(&[u8::from(self.directory)]);
        hash.text(self.owner.as_deref().unwrap_or_default());
        hash.part(&self.chmod.unwrap_or(u32::MAX).to_le_bytes());
    }
}

/// Where a stage is while its steps are gone through.
struct StageState {
    key: String,
    config: ImageConfig,
    shell: Vec<String>,
    args: BTreeMap<String, String>,
    cmd_set: bool,
}

impl StageState {
    fn begin(&self, what: &str) -> Hasher {
        let mut hash = Hasher::new(what);
        hash.text(&self.key);
        hash
    }

    fn env(&self, name: &str) -> Option<&String> {
        let mut known = self.config.env.iter();
        known
            .find(|(known, _)| known == name)
            .map(|(_, value)| value)
    }

    /// A variable's value: `ENV` goes before `ARG`.
    fn lookup(&self, name: &str) -> Option<String> {
        self.env(name).or_else(|| self.args.get(name)).cloned()
    }

    fn set_env(&mut self, name: String, value: String) {
        match self.config.env.iter_mut().find(|(known, _)| *known == name) {
            Some((_, old)) => *old = value,
            None => self.config.env.push((name, value)),
        }
    }

    fn workdir(&self) -> &str {
        self.config.workdir.as_deref().unwrap_or("/")
    }

    fn words(&self, command: &Command) -> Vec<String> {
        match command {
            Command::Exec(words) => words.clone(),
            Command::Shell(line) => {
                let mut words = self.shell.clone();
                words.push(line.clone());
                words
            }
        }
    }
}

/// A path in the guest, absolute and without `.`, `..` and slashes that say nothing.
pub(super) fn guest_path(workdir: &str, path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    let above = if path.starts_with('/') { "" } else { workdir };
    for part in above.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// A here-document with its variables replaced; quotes are text like any other.
fn expand_document(
    text: &str,
    escape: char,
    lookup: words::Lookup<'_>,
) -> std::result::Result<String, String> {
    let mut kept = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\'' || c == '"' {
            kept.push(escape);
        }
        kept.push(c);
    }
    words::expand(&kept, escape, lookup)
}

/// The ports that a word of `EXPOSE` means, as `PORT/PROTOCOL`.
fn exposed(text: &str) -> Option<Vec<String>> {
    /// More ports than anybody lists.
    const RANGE_MAX: u16 = 1024;
    let (ports, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let protocol = protocol.to_ascii_lowercase();
    if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
        return None;
    }
    let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0);
    let (first, last) = (number(first)?, number(last)?);
    let fits = first <= last && last - first < RANGE_MAX;
    fits.then(|| {
        (first..=last)
            .map(|port| format!("{port}/{protocol}"))
            .collect()
    })
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
