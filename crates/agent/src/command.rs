//! From a request to everything a child needs: who, where, which program, with what environment.

use std::ffi::CString;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::process::{Gid, Pid, Uid};
use smolvm_proto::message::{EnvVar, ExecRequest, Failure, FailureKind, Program};

use crate::failure::{failure, from_errno};
use crate::reap::Reaper;
use crate::sftp;
use crate::stream::Stream;
use crate::sys::{self, SpawnError, Stage};
use crate::users::{self, Identity};

/// What every command starts with, as Debian's login gives it to root.
const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The shell that every system has.
const SHELL: &str = "/bin/sh";

/// What holds for every command since the machine's birth.
#[derive(Debug, Clone, Default)]
pub(crate) struct Defaults {
    pub(crate) env: Vec<EnvVar>,
    pub(crate) cwd: Option<Vec<u8>>,
    pub(crate) user: Option<String>,
}

/// Where a command's program is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// As the first argument says.
    Path,
    /// The user's shell, or else the one that every system has.
    Shell,
    /// This program.
    Ourselves,
}

/// A command, ready to start.
#[derive(Debug)]
pub(crate) struct Command {
    pub(crate) identity: Identity,
    program: Source,
    argv: Vec<CString>,
    env: Vec<CString>,
    cwd: CString,
    cwd_optional: bool,
    /// Value of the command's own `PATH`.
    path: Vec<u8>,
}

impl Command {
    /// Understands a request. Nothing is left to interpret after this.
    pub(crate) fn new(request: &ExecRequest, defaults: &Defaults) -> Result<Self, Failure> {
        let argv = request
            .argv
            .iter()
            .map(|argument| c_string("argument", argument))
            .collect::<Result<Vec<_>, _>>()?;
        let user = request.user.as_deref().or(defaults.user.as_deref());
        let identity = users::look_up(user.unwrap_or("root"))?;
        let (program, argv) = match request.program {
            None if argv.first().is_none_or(|program| program.is_empty()) => {
                return Err(failure(
                    FailureKind::InvalidInput,
                    "running a command: its argument list names no program",
                ));
            }
            None => (Source::Path, argv),
            Some(Program::Shell) => {
                let mut words = vec![shell_name(&identity.shell, argv.is_empty())?];
                words.extend(argv);
                (Source::Shell, words)
            }
            Some(Program::Sftp) => {
                let home = c_string("home", identity.home.as_bytes())?;
                let words = vec![c"smolvm-agent".into(), sftp::WORD.into(), home];
                (Source::Ourselves, words)
            }
        };
        let given = request
            .cwd
            .as_ref()
            .map(|cwd| cwd.as_slice())
            .or(defaults.cwd.as_deref());
        let cwd = c_string(
            "working directory",
            given.unwrap_or(identity.home.as_bytes()),
        )?;
        let env = environment(
            &identity,
            request.terminal.is_some(),
            defaults,
            &request.env,
        )?;
        let path = env
            .iter()
            .find(|(name, _)| name == b"PATH")
            .map(|(_, value)| value.clone())
            .unwrap_or_default();
        let env = env
            .into_iter()
            .map(|(name, value)| c_string("environment", &[name, value].join(&b'=')))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            cwd_optional: given.is_none(),
            identity,
            program,
            argv,
            env,
            cwd,
            path,
        })
    }

    /// Starts it, and returns when its program is loaded.
    pub(crate) fn start(
        &self,
        reaper: &Reaper,
        stream: &Arc<Stream>,
        stdio: [BorrowedFd<'_>; 3],
        terminal: bool,
        cgroup: Option<BorrowedFd<'_>>,
    ) -> Result<Pid, Failure> {
        let groups: Vec<Gid> = self
            .identity
            .groups
            .iter()
            .map(|gid| Gid::from_raw(*gid))
            .collect();
        let mut refused = None;
        for program in self.candidates()? {
            let program = c_string("program", program.as_os_str().as_bytes())?;
            let plan = sys::Plan {
                program: &program,
                argv: &self.argv,
                env: &self.env,
                stdio,
                terminal,
                uid: Uid::from_raw(self.identity.uid),
                gid: Gid::from_raw(self.identity.gid),
                groups: &groups,
                cwd: &self.cwd,
                cwd_optional: self.cwd_optional,
                cgroup,
            };
            match reaper.spawn(stream, || sys::spawn(&plan)) {
                Ok(pid) => return Ok(pid),
                // Like execvp(3): what this user may not run hides nothing further on.
                Err(
                    error @ SpawnError {
                        stage: Stage::Exec,
                        errno: Errno::ACCESS | Errno::NOENT | Errno::NOTDIR,
                    },
                ) => {
                    refused.get_or_insert_with(|| self.explain(error, &program));
                }
                Err(error) => return Err(self.explain(error, &program)),
            }
        }
        Err(refused.unwrap_or_else(|| self.not_found()))
    }

    fn not_found(&self) -> Failure {
        failure(
            FailureKind::NotFound,
            format!(
                "running {}: there is no such program in PATH={}",
                self.argv[0].to_string_lossy(),
                String::from_utf8_lossy(&self.path)
            ),
        )
    }

    /// The files that may be the program, best first.
    fn candidates(&self) -> Result<Vec<PathBuf>, Failure> {
        match self.program {
            Source::Path => {}
            Source::Shell => return Ok(vec![(&self.identity.shell).into(), SHELL.into()]),
            // The child is this program until it has loaded another, whatever has become of the
            // file; and to itself a process's entry in proc(5) is open, whoever it runs as.
            Source::Ourselves => return Ok(vec!["/proc/self/exe".into()]),
        }
        let program = self.argv[0].as_bytes();
        if program.contains(&b'/') {
            return Ok(vec![path_of(program)]);
        }
        let cwd = Path::new(std::ffi::OsStr::from_bytes(self.cwd.as_bytes()));
        let found = search(program, &self.path, cwd, |path| match path.metadata() {
            Ok(status) if !status.is_file() => Found::Nothing,
            Ok(status) if status.mode() & 0o111 == 0 => Found::NotExecutable,
            Ok(_) => Found::Program,
            Err(_) => Found::Nothing,
        });
        match found {
            Search::Programs(paths) => Ok(paths),
            Search::OnlyNotExecutable(path) => Err(failure(
                FailureKind::NotExecutable,
                format!("running {}: it has no execute permission", path.display()),
            )),
            Search::Nothing => Err(self.not_found()),
        }
    }

    fn explain(&self, error: SpawnError, program: &CString) -> Failure {
        let shown = program.to_string_lossy();
        let SpawnError { stage, errno } = error;
        match stage {
            Stage::Create => from_errno(&format!("making a process for {shown}"), errno),
            Stage::Prepare => from_errno(&format!("preparing the descriptors of {shown}"), errno),
            Stage::Identity => from_errno(
                &format!("becoming user {} to run {shown}", self.identity.name),
                errno,
            ),
            Stage::Directory => from_errno(
                &format!("entering the directory {}", self.cwd.to_string_lossy()),
                errno,
            ),
            Stage::Exec => {
                let path = Path::new(std::ffi::OsStr::from_bytes(self.cwd.as_bytes()))
                    .join(path_of(program.as_bytes()));
                let status = path.metadata();
                match (errno, status) {
                    (Errno::ACCESS, Ok(status))
                        if status.is_file() && status.permissions().mode() & 0o111 == 0 =>
                    {
                        failure(
                            FailureKind::NotExecutable,
                            format!("running {shown}: it has no execute permission"),
                        )
                    }
                    // execve(2): ENOENT also means that the interpreter is not there.
                    (Errno::NOENT, Ok(_)) => failure(
                        FailureKind::NotFound,
                        format!("running {shown}: the interpreter or loader it names is not there"),
                    ),
                    _ => from_errno(&format!("running {shown}"), errno),
                }
            }
        }
    }
}

/// The shell's name for itself: its file's, after a dash if it is a login shell (bash(1)).
fn shell_name(shell: &str, login: bool) -> Result<CString, Failure> {
    let name = shell.rsplit('/').next().unwrap_or(shell);
    let dash = if login { "-" } else { "" };
    c_string("shell", format!("{dash}{name}").as_bytes())
}

fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(std::ffi::OsString::from_vec(bytes.to_vec()))
}

fn c_string(what: &str, bytes: &[u8]) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| {
        failure(
            FailureKind::InvalidInput,
            format!(
                "running a command: the {what} {:?} has a NUL in it",
                String::from_utf8_lossy(bytes)
            ),
        )
    })
}

type Variables = Vec<(Vec<u8>, Vec<u8>)>;

/// The agent's defaults, then the machine's, then the request's; the last one set counts.
fn environment(
    identity: &Identity,
    terminal: bool,
    defaults: &Defaults,
    request: &[EnvVar],
) -> Result<Variables, Failure> {
    let mut variables: Variables = Vec::new();
    let mut set =
        |name: &[u8], value: &[u8]| match variables.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => *old = value.to_vec(),
            None => variables.push((name.to_vec(), value.to_vec())),
        };
    set(b"PATH", PATH);
    set(b"HOME", identity.home.as_bytes());
    set(b"USER", identity.name.as_bytes());
    set(b"LOGNAME", identity.name.as_bytes());
    set(b"SHELL", identity.shell.as_bytes());
    set(b"LANG", b"C.UTF-8");
    if terminal {
        set(b"TERM", b"xterm-256color");
    }
    for variable in defaults.env.iter().chain(request) {
        if variable.name.is_empty() || variable.name.contains(&b'=') {
            return Err(failure(
                FailureKind::InvalidInput,
                format!(
                    "running a command: {:?} is no name for a variable",
                    String::from_utf8_lossy(&variable.name)
                ),
            ));
        }
        set(&variable.name, &variable.value);
    }
    Ok(variables)
}

/// What is at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Program,
    NotExecutable,
    Nothing,
}

/// What a walk along `PATH` came to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Search {
    Programs(Vec<PathBuf>),
    OnlyNotExecutable(PathBuf),
    Nothing,
}

/// Looks for a program in the directories of `path`; an empty one means `cwd` (environ(7)).
///
/// The agent looks before it makes the child, because a failed execve(2) costs far more than a
/// failed stat(2).
fn search(program: &[u8], path: &[u8], cwd: &Path, probe: impl Fn(&Path) -> Found) -> Search {
    let mut programs = Vec::new();
    let mut other = None;
    for directory in path.split(|byte| *byte == b':') {
        let candidate = cwd.join(path_of(directory)).join(path_of(program));
        match probe(&candidate) {
            Found::Program => programs.push(candidate),
            Found::NotExecutable => other = other.or(Some(candidate)),
            Found::Nothing => {}
        }
    }
    match (programs.is_empty(), other) {
        (false, _) => Search::Programs(programs),
        (true, Some(path)) => Search::OnlyNotExecutable(path),
        (true, None) => Search::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(program: &str, path: &str) -> Search {
        search(
            program.as_bytes(),
            path.as_bytes(),
            Path::new("/srv"),
            |path| match path.to_str() {
                Some("/bin/a" | "/usr/bin/a" | "/srv/b" | "/srv/sub/c") => Found::Program,
                Some("/bin/data" | "/bin/b") => Found::NotExecutable,
                _ => Found::Nothing,
            },
        )
    }

    #[test]
    fn programs_are_found_in_the_order_of_path() {
        let both = |first: &str, second: &str| Search::Programs(vec![first.into(), second.into()]);
        assert_eq!(look("a", "/usr/bin:/bin"), both("/usr/bin/a", "/bin/a"));
        assert_eq!(
            look("a", "/none:/bin:/usr/bin"),
            both("/bin/a", "/usr/bin/a")
        );
        assert_eq!(look("z", "/usr/bin:/bin"), Search::Nothing);
    }

    #[test]
    fn a_login_shell_is_told_so_by_its_name() {
        let name = |login| shell_name("/bin/bash", login).expect("no NUL");
        assert_eq!(name(true).as_c_str(), c"-bash");
        assert_eq!(name(false).as_c_str(), c"bash");
    }

    #[test]
    fn empty_and_relative_directories_start_at_the_commands_own() {
        assert_eq!(look("b", "/bin:"), Search::Programs(vec!["/srv/b".into()]));
        assert_eq!(
            look("c", "sub"),
            Search::Programs(vec!["/srv/sub/c".into()])
        );
    }

    #[test]
    fn a_file_that_cannot_be_run_is_told_apart_from_none() {
        assert_eq!(
            look("data", "/usr/bin:/bin"),
            Search::OnlyNotExecutable("/bin/data".into())
        );
    }

    #[test]
    fn the_last_setting_of_a_variable_counts() {
        let variable = |name: &str, value: &str| EnvVar {
            name: name.as_bytes().to_vec().into(),
            value: value.as_bytes().to_vec().into(),
        };
        let identity = users::look_up("4000").expect("numbers need no entry");
        let defaults = Defaults {
            env: vec![variable("A", "machine"), variable("B", "machine")],
            ..Defaults::default()
        };
        let env = environment(&identity, true, &defaults, &[variable("B", "request")])
            .expect("well formed");
        let get = |name: &str| {
            env.iter()
                .find(|(known, _)| known == name.as_bytes())
                .map(|(_, value)| String::from_utf8_lossy(value).into_owned())
        };
        assert_eq!(get("A").as_deref(), Some("machine"));
        assert_eq!(get("B").as_deref(), Some("request"));
        assert_eq!(get("TERM").as_deref(), Some("xterm-256color"));
        assert_eq!(get("USER").as_deref(), Some("4000"));
        for bad in ["", "A=B"] {
            assert!(environment(&identity, false, &defaults, &[variable(bad, "")]).is_err());
        }
    }
}
