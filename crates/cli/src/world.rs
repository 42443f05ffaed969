//! The world outside, read once: arguments, environment, terminals, the program's own place.
//!
//! No other file of this crate reads the environment.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};

use smolvm_engine::{
    Config, NetworkConfig, ProxySettings, RegistrySettings, RegistryTable, SETTINGS_NAME, Settings,
};

use crate::args::Globals;
use crate::report::CliError;

/// Variable with which the shells' completion scripts call back.
pub(crate) const COMPLETE_VARIABLE: &str = "_SMOLVM_COMPLETE";

/// Where Debian keeps programs for administrators; a plain user's `PATH` often leaves them out, and
/// tools that build file systems live there.
const ADMINISTRATOR_DIRS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// What was read.
#[derive(Debug)]
pub(crate) struct World {
    /// The command line, the program's name first.
    pub(crate) args: Vec<OsString>,
    /// Whether a shell asks for completions.
    pub(crate) completing: bool,
    /// Whether standard input is a terminal.
    pub(crate) stdin_terminal: bool,
    /// Whether standard output is a terminal.
    pub(crate) stdout_terminal: bool,
    /// Whether standard error is a terminal.
    pub(crate) stderr_terminal: bool,
    /// The terminal's type, `TERM`.
    pub(crate) term: Option<String>,
}

impl World {
    /// Reads the little every command needs.
    pub(crate) fn read() -> Self {
        Self {
            args: env::args_os().collect(),
            completing: set(COMPLETE_VARIABLE).is_some_and(|value| value != "0"),
            stdin_terminal: std::io::stdin().is_terminal(),
            stdout_terminal: std::io::stdout().is_terminal(),
            stderr_terminal: std::io::stderr().is_terminal(),
            term: set("TERM").and_then(|term| term.into_string().ok()),
        }
    }

    /// A variable of the caller's environment, if it is set and is text.
    pub(crate) fn variable(&self, name: &str) -> Option<String> {
        // The standard library panics on these names instead of saying that nothing has them.
        if name.is_empty() || name.contains(['=', '\0']) {
            return None;
        }
        env::var(name).ok()
    }

    /// What the engine is to know of the world.
    ///
    /// # Errors
    ///
    /// [`CliError::Usage`] if nothing says where to keep state; that of the engine for a file of
    /// settings that cannot be.
    pub(crate) fn config(
        &self,
        globals: &Globals,
        boot_timeout: Option<std::time::Duration>,
    ) -> Result<Config, CliError> {
        let data_dir = match &globals.data_dir {
            Some(dir) => dir.clone(),
            None => match set("SMOLVM_DATA_DIR") {
                Some(dir) => dir.into(),
                None => default_data_dir(
                    rustix::process::geteuid().is_root(),
                    set("XDG_STATE_HOME").map(PathBuf::from).as_deref(),
                    set("HOME").map(PathBuf::from).as_deref(),
                )
                .ok_or_else(|| {
                    CliError::usage(
                        "cannot tell where to keep state: HOME is not set",
                        "give --data-dir, or set SMOLVM_DATA_DIR",
                    )
                })?,
            },
        };
        let data_dir = std::path::absolute(&data_dir)
            .map_err(|error| CliError::io("finding the current directory", error))?;
        let settings = settings(&data_dir.join(SETTINGS_NAME))?;
        let directory = data_dir.clone();
        Ok(Config {
            data_dir,
            keeper: program("SMOLVM_KEEPER", "smolvm-keeper"),
            agent: program("SMOLVM_AGENT", "smolvm-agent"),
            program_dirs: program_dirs(),
            accel: globals.accel.into(),
            engine: globals.engine.into(),
            templates: set("SMOLVM_NO_TEMPLATES").is_none(),
            network: NetworkConfig {
                prefix: settings.network.prefix.net(),
                ..NetworkConfig::default()
            },
            registries: registries(&settings.registries, &directory),
            boot_timeout: boot_timeout.unwrap_or(smolvm_engine::BOOT_TIMEOUT_DEFAULT),
            settings,
        })
    }
}

/// What the owner of the data directory has set; the defaults if there is no such file.
fn settings(path: &Path) -> Result<Settings, CliError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Settings::parse(&text, path)?),
        // Nor in a directory that is none, of which the engine has more to say.
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            Ok(Settings::default())
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let error = smolvm_engine::Error::new(
                smolvm_engine::ErrorKind::PermissionDenied,
                format!("could not read the settings in {}", path.display()),
            )
            .because(error);
            Err(error
                .hint(
                    "let this user read the file, or use a directory of your own with --data-dir or \
                     SMOLVM_DATA_DIR",
                )
                .into())
        }
        Err(error) => Err(CliError::io(format!("reading {}", path.display()), error)),
    }
}

/// How to reach registries of images. Variables are asked before the settings in `directory`.
fn registries(table: &RegistryTable, directory: &Path) -> RegistrySettings {
    let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
    // curl and Go know both spellings.
    let either = |name: &str| text(name).or_else(|| text(&name.to_uppercase()));
    let mut mirrors = mirrors(&text("SMOLVM_REGISTRY_MIRRORS").unwrap_or_default());
    for (registry, places) in &table.mirrors {
        let known = mirrors.entry(registry.clone()).or_default();
        known.extend(places.iter().cloned());
    }
    let own = table.authorities.iter().map(|path| directory.join(path));
    RegistrySettings {
        auth_files: auth_files(&|name| set(name).map(PathBuf::from)),
        mirrors,
        plain_http: table.plain_http.clone(),
        // As OpenSSL and what is made with it has it.
        authorities: set("SSL_CERT_FILE")
            .map(PathBuf::from)
            .into_iter()
            .chain(own)
            .collect(),
        proxy: ProxySettings {
            https: either("https_proxy").or_else(|| either("all_proxy")),
            none_for: either("no_proxy"),
        },
    }
}

/// Where Docker and Podman keep credentials, as containers-auth.json(5) and Docker's manual say.
fn auth_files(set: &dyn Fn(&str) -> Option<PathBuf>) -> Vec<PathBuf> {
    let home = set("HOME");
    let at_home = |path: &str| home.as_ref().map(|home| home.join(path));
    let below = |dir: &str, path: &str| set(dir).map(|dir| dir.join(path));
    [
        set("REGISTRY_AUTH_FILE"),
        below("XDG_RUNTIME_DIR", "containers/auth.json"),
        below("XDG_CONFIG_HOME", "containers/auth.json")
            .or_else(|| at_home(".config/containers/auth.json")),
        below("DOCKER_CONFIG", "config.json").or_else(|| at_home(".docker/config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// `REGISTRY=MIRROR`, several with commas between.
fn mirrors(text: &str) -> BTreeMap<String, Vec<String>> {
    let mut mirrors: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let pairs = text
        .split(',')
        .filter_map(|pair| pair.trim().split_once('='));
    for (registry, mirror) in pairs {
        mirrors
            .entry(registry.trim().to_owned())
            .or_default()
            .push(mirror.trim().to_owned());
    }
    mirrors
}

/// A variable that is set to something.
fn set(name: &str) -> Option<OsString> {
    env::var_os(name).filter(|value| !value.is_empty())
}

/// One of our own programs: where a variable says, else beside this one.
fn program(variable: &str, name: &str) -> PathBuf {
    if let Some(path) = set(variable) {
        return path.into();
    }
    env::current_exe()
        .ok()
        .and_then(|exe| exe.parent().map(|dir| dir.join(name)))
        .unwrap_or_else(|| PathBuf::from(name))
}

fn program_dirs() -> Vec<PathBuf> {
    if let Some(path) = env::var_os("SMOLVM_PROGRAM_PATH") {
        return split(&path);
    }
    let mut dirs = env::var_os("PATH")
        .map(|path| split(&path))
        .unwrap_or_default();
    for dir in ADMINISTRATOR_DIRS.map(PathBuf::from) {
        if !dirs.contains(&dir) {
            dirs.push(dir);
        }
    }
    dirs
}

/// The absolute directories of a path list. An empty or relative one means the current directory,
/// and a sandbox tool runs no program that happens to lie there.
fn split(path: &std::ffi::OsStr) -> Vec<PathBuf> {
    env::split_paths(path)
        .filter(|dir| dir.is_absolute())
        .collect()
}

/// Where state is kept when nobody says.
fn default_data_dir(root: bool, state_home: Option<&Path>, home: Option<&Path>) -> Option<PathBuf> {
    if root {
        return Some("/var/lib/smolvm".into());
    }
    // The XDG specification: a relative path is to be ignored.
    match state_home.filter(|dir| dir.is_absolute()) {
        Some(dir) => Some(dir.join("smolvm")),
        None => home.map(|home| home.join(".local/state/smolvm")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_kept_where_its_owner_looks() {
        let dir = |root, state: Option<&str>, home: Option<&str>| {
            default_data_dir(root, state.map(Path::new), home.map(Path::new))
                .map(|dir| dir.display().to_string())
        };
        assert_eq!(
            dir(true, Some("/x"), Some("/root")).as_deref(),
            Some("/var/lib/smolvm")
        );
        assert_eq!(
            dir(false, Some("/x"), Some("/home/a")).as_deref(),
            Some("/x/smolvm")
        );
        assert_eq!(
            dir(false, Some("x"), Some("/home/a")).as_deref(),
            Some("/home/a/.local/state/smolvm")
        );
        assert_eq!(dir(false, None, None), None);
    }

    #[test]
    fn credentials_are_looked_for_where_others_keep_them() {
        let files = |variables: &[(&str, &str)]| {
            let set = |name: &str| {
                let mut found = variables.iter().filter(|(known, _)| *known == name);
                found.next().map(|(_, value)| PathBuf::from(value))
            };
            let files = auth_files(&set).into_iter();
            files
                .map(|file| file.display().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            files(&[("HOME", "/h")]),
            ["/h/.config/containers/auth.json", "/h/.docker/config.json"]
        );
        assert_eq!(
            files(&[
                ("HOME", "/h"),
                ("REGISTRY_AUTH_FILE", "/r"),
                ("XDG_RUNTIME_DIR", "/x"),
                ("DOCKER_CONFIG", "/d"),
            ]),
            [
                "/r",
                "/x/containers/auth.json",
                "/h/.config/containers/auth.json",
                "/d/config.json"
            ]
        );
        assert_eq!(files(&[]), Vec::<String>::new());
    }

    #[test]
    fn mirrors_are_pairs() {
        let found = mirrors("docker.io=https://a/x, docker.io = b ,ghcr.io=c,junk,");
        assert_eq!(found["docker.io"], ["https://a/x", "b"]);
        assert_eq!(found["ghcr.io"], ["c"]);
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn only_absolute_program_directories_are_searched() {
        assert_eq!(
            split("/a::b:/c".as_ref()),
            [PathBuf::from("/a"), PathBuf::from("/c")]
        );
    }
}
