//! SSH to sandboxes: who may come in, and by which keys the two sides know each other.
//!
//! ```text
//! <data>/ssh/id_ed25519              the key of whoever owns the data directory, and its .pub
//! <data>/sandboxes/<id>/host_key     the sandbox's own, made when it is first needed
//! <data>/sandboxes/<id>/known_hosts  the same as a client reads it
//! ```
//!
//! A sandbox's key lies in its directory: it stays over stops and starts, and what is made from a
//! snapshot, a template or a pool has another.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use smolvm_host::net::alloc::PortRange;
use smolvm_host::net::user::HostSide;
use smolvm_host::os::{Durability, Os};
use ssh_key::private::{Ed25519Keypair, KeypairData};
use ssh_key::{Algorithm, LineEnding, PrivateKey, PublicKey};

use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{Layout, SandboxDir};
use crate::ports::{self, HostPort};
use crate::store::{SandboxRow, Store};

/// The address on which sandboxes are reached by SSH.
pub const SSH_ADDRESS: Ipv4Addr = Ipv4Addr::LOCALHOST;

/// Most keys that one sandbox lets in beside its owner's.
pub const SSH_KEYS_MAX: usize = 64;

/// Who may come in by SSH.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SshSpec {
    keys: Vec<String>,
}

impl SshSpec {
    /// Lets in whoever has one of these keys, beside the owner of the data directory. Each text holds
    /// public keys as OpenSSH writes them, one a line; empty lines and those that begin with `#` are
    /// left out.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::InvalidInput`] for what is no such key, or one of a kind that is not accepted.
    pub fn new<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut keys = Vec::new();
        for text in texts {
            let before = keys.len();
            for line in text.lines().map(str::trim) {
                if !line.is_empty() && !line.starts_with('#') {
                    keys.push(check_key(line)?);
                }
            }
            if keys.len() == before {
                return Err(Error::new(
                    ErrorKind::InvalidInput,
                    "the file of an SSH key has none in it",
                ));
            }
        }
        if keys.len() > SSH_KEYS_MAX {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{} SSH keys are above the most, {SSH_KEYS_MAX}", keys.len()),
            ));
        }
        Ok(Self { keys })
    }

    /// The keys beside the owner's, as OpenSSH writes them.
    #[must_use]
    pub fn keys(&self) -> &[String] {
        &self.keys
    }

    /// The keys as the store has them.
    pub(crate) fn stored(&self) -> String {
        self.keys.join("\n")
    }

    /// Reads the store, where they were checked when they were written.
    pub(crate) fn from_stored(text: &str) -> Self {
        Self {
            keys: text.lines().map(str::to_owned).collect(),
        }
    }
}

/// A public key in one line, without what does not belong to it.
fn check_key(line: &str) -> Result<String> {
    let wrong = |why: &str| {
        Error::new(ErrorKind::InvalidInput, "the SSH key cannot be used")
            .because(why.to_owned())
            .hint("give the file of a public key, such as ~/.ssh/id_ed25519.pub")
    };
    if line.contains("PRIVATE KEY") {
        return Err(wrong("the file holds a private key"));
    }
    let key = PublicKey::from_openssh(line).map_err(|error| wrong(&error.to_string()))?;
    match key.algorithm() {
        Algorithm::Ed25519
        | Algorithm::Ecdsa { .. }
        | Algorithm::SkEd25519
        | Algorithm::SkEcdsaSha2NistP256 => {}
        other => {
            return Err(wrong(&format!(
                "keys of kind {} are not accepted; make one with `ssh-keygen -t ed25519`",
                other.as_str()
            )));
        }
    }
    key.to_openssh().map_err(|error| wrong(&error.to_string()))
}

/// All that a client needs to reach a sandbox by SSH.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SshAccess {
    /// Port on [`SSH_ADDRESS`].
    pub port: u16,
    /// Who to be in the guest, if nobody else is asked for.
    pub user: String,
    /// File of the private key that the sandbox lets in.
    pub identity: PathBuf,
    /// File with the sandbox's own key.
    pub known_hosts: PathBuf,
    /// The name by which the sandbox's key is known there.
    pub alias: String,
}

impl SshAccess {
    /// The options of OpenSSH (`ssh_config(5)`) that lead to the sandbox and to nothing else.
    #[must_use]
    pub fn options(&self) -> Vec<(&'static str, String)> {
        vec![
            ("HostName", SSH_ADDRESS.to_string()),
            ("Port", self.port.to_string()),
            ("User", self.user.clone()),
            ("IdentityFile", quoted(&self.identity)),
            ("IdentitiesOnly", "yes".to_owned()),
            ("HostKeyAlias", self.alias.clone()),
            ("UserKnownHostsFile", quoted(&self.known_hosts)),
            ("GlobalKnownHostsFile", "none".to_owned()),
            ("StrictHostKeyChecking", "yes".to_owned()),
            ("UpdateHostKeys", "no".to_owned()),
            ("PasswordAuthentication", "no".to_owned()),
            ("SendEnv", "LANG LC_* COLORTERM NO_COLOR".to_owned()),
        ]
    }

    /// A block for a file of OpenSSH's configuration.
    #[must_use]
    pub fn config(&self, host: &str) -> String {
        let mut text = format!("Host {host}\n");
        for (name, value) in self.options() {
            let _ = writeln!(text, "    {name} {value}");
        }
        text
    }
}

/// A path as ssh_config(5) reads it: in quotes, and without its `%` words.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string().replace('%', "%%");
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

impl Engine {
    /// Gives a sandbox that was just written its port, if it is to have one. Without one left the
    /// sandbox is gone again.
    pub(crate) fn give_ssh_port(&self, store: &mut Store, row: &SandboxRow) -> Result<Option<u16>> {
        if row.spec.ssh.is_none() {
            return Ok(None);
        }
        let pool = self.config().settings.ssh.ports;
        match listen(self.os(), &HostSide::here(), store, &row.id, pool) {
            // Its keeper listens when it runs.
            Ok((host, _)) => Ok(Some(host.port)),
            Err(error) => {
                store.delete_sandbox(&row.id)?;
                Err(error)
            }
        }
    }

    /// How to reach a sandbox by SSH. Makes the keys that are not there yet.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InvalidInput`] for one that was made without SSH.
    pub fn ssh(&self, name: &str) -> Result<SshAccess> {
        let info = self.info(name)?;
        let Some(port) = info.ssh_port else {
            if info.ssh {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("sandbox `{name}` found no free port for SSH when it started"),
                )
                .hint("remove sandboxes with `smolvm rm`, or set a larger `ports` under `[ssh]` in config.toml in the data directory; then stop and start it"));
            }
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("sandbox `{name}` is not reached by SSH"),
            )
            .hint(format!(
                "use `smolvm shell {name}`, or create it without --no-ssh"
            )));
        };
        let dir = self.layout().sandbox(&info.id);
        let key = host_key(self.os(), self.layout(), &dir)?;
        let alias = format!("smolvm-{}", info.id);
        let line = key.public_key().to_openssh().map_err(unwritable)?;
        self.os().write_file_atomic(
            "write the sandbox's SSH key for clients",
            &dir.known_hosts(),
            format!("{alias} {line}\n").as_bytes(),
            0o600,
            Durability::Cached,
        )?;
        Ok(SshAccess {
            port,
            user: info.user.unwrap_or_else(|| "root".to_owned()),
            identity: user_key(self.os(), self.layout())?,
            known_hosts: dir.known_hosts(),
            alias,
        })
    }
}

/// Listens where a sandbox is reached by SSH: on the port that it has, or on another of `pool` if it has
/// none or something else listens there by now. The store has the port before this returns.
///
/// # Errors
///
/// [`ErrorKind::Busy`] if there is no port left, with the pool and how to enlarge it.
pub fn listen(
    os: &Os,
    side: &HostSide,
    store: &mut Store,
    id: &str,
    pool: PortRange,
) -> Result<(HostPort, OwnedFd)> {
    if let Some(host) = store.ssh_port(id)? {
        match ports::listen(os, side, &host) {
            Err(error) if error.kind() == ErrorKind::Busy => store.forget_ssh_port(id)?,
            socket => return Ok((host, socket?)),
        }
    }
    let mut held = None;
    // Where to begin, so that two at once rarely meet.
    let seed = u64::from_str_radix(id, 16).unwrap_or(0);
    let host = store.allocate_ssh_port(id, SSH_ADDRESS.into(), pool, seed, |host| {
        held = ports::listen(os, side, host).ok();
        held.is_some()
    })?;
    match held {
        Some(socket) => Ok((host, socket)),
        // Somebody else has given it this port meanwhile.
        None => Ok((host, ports::listen(os, side, &host)?)),
    }
}

/// The file of the owner's private key, made if it is not there.
///
/// # Errors
///
/// Those of writing it.
pub(crate) fn user_key(os: &Os, layout: &Layout) -> Result<PathBuf> {
    let path = layout.ssh().join("id_ed25519");
    if path.exists() {
        return Ok(path);
    }
    let _turn = turn(os, layout)?;
    if path.exists() {
        return Ok(path);
    }
    let mut key = new_key()?;
    key.set_comment("smolvm");
    let public = key.public_key().to_openssh().map_err(unwritable)? + "\n";
    // Complete once the private one is there.
    os.write_file_atomic(
        "write the public SSH key",
        &path.with_extension("pub"),
        public.as_bytes(),
        0o644,
        Durability::Synced,
    )?;
    write_key(os, &path, &key)?;
    Ok(path)
}

/// A sandbox's own key, made if it is not there.
///
/// # Errors
///
/// Those of writing or reading it.
pub fn host_key(os: &Os, layout: &Layout, dir: &SandboxDir) -> Result<PrivateKey> {
    let path = dir.host_key();
    if !path.exists() {
        let _turn = turn(os, layout)?;
        if !path.exists() {
            write_key(os, &path, &new_key()?)?;
        }
    }
    let text = os.read("read the sandbox's SSH key", &path)?;
    PrivateKey::from_openssh(text).map_err(|error| {
        Error::new(
            ErrorKind::State,
            format!("could not understand the SSH key {}", path.display()),
        )
        .because(error)
        .hint("remove the file; the sandbox then gets another key")
    })
}

/// Whether the owner of the data directory, or one of `spec`, has this key.
#[must_use]
pub fn may_enter(layout: &Layout, spec: &SshSpec, key: &PublicKey) -> bool {
    let owner = std::fs::read_to_string(layout.ssh().join("id_ed25519.pub")).unwrap_or_default();
    spec.keys
        .iter()
        .map(String::as_str)
        .chain(owner.lines())
        .filter_map(|line| PublicKey::from_openssh(line).ok())
        .any(|known| known.key_data() == key.key_data())
}

/// The lock under which keys are made: of two processes that need one, one makes it.
fn turn(os: &Os, layout: &Layout) -> Result<smolvm_host::os::Lock> {
    os.create_dir_all("make the directory of SSH keys", &layout.ssh())?;
    Ok(os.lock("lock the SSH keys", &layout.ssh().join("lock"))?)
}

fn new_key() -> Result<PrivateKey> {
    let mut seed = [0; 32];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty()).map_err(|error| {
        crate::error::io("could not get random bytes from the kernel", error.into())
    })?;
    PrivateKey::new(
        KeypairData::from(Ed25519Keypair::from_seed(&seed)),
        String::new(),
    )
    .map_err(unwritable)
}

fn write_key(os: &Os, path: &Path, key: &PrivateKey) -> Result<()> {
    let text = key.to_openssh(LineEnding::LF).map_err(unwritable)?;
    Ok(os.write_file_atomic(
        "write the SSH key",
        path,
        text.as_bytes(),
        0o600,
        Durability::Synced,
    )?)
}

fn unwritable(error: ssh_key::Error) -> Error {
    Error::new(ErrorKind::Internal, "could not make an SSH key").because(error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn keys_are_made_once_and_kept_private() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(dir.path().to_owned());
        let os = Os::new();
        let sandbox = |id: &str| {
            let dir = layout.sandbox(id);
            std::fs::create_dir_all(dir.path()).expect("a directory");
            dir
        };
        let (a, b) = (sandbox("a"), sandbox("b"));
        let key = host_key(&os, &layout, &a).expect("made");
        assert_eq!(host_key(&os, &layout, &a).expect("read"), key);
        assert_ne!(host_key(&os, &layout, &b).expect("made"), key);
        let user = user_key(&os, &layout).expect("made");
        let text = std::fs::read(&user).expect("a file");
        assert_eq!(user_key(&os, &layout).expect("kept"), user);
        assert_eq!(std::fs::read(&user).expect("a file"), text);
        for path in [&user, &a.host_key(), &b.host_key()] {
            let mode = std::fs::metadata(path).expect("a file").permissions();
            assert_eq!(mode.mode() & 0o777, 0o600, "{}", path.display());
        }
        let ours = PrivateKey::from_openssh(text).expect("a key");
        assert!(may_enter(&layout, &SshSpec::default(), ours.public_key()));
        assert!(!may_enter(&layout, &SshSpec::default(), key.public_key()));
        let other = key.public_key().to_openssh().expect("text");
        let spec = SshSpec::new([other.as_str()]).expect("a key");
        assert!(may_enter(&layout, &spec, key.public_key()));
        assert_eq!(SshSpec::from_stored(&spec.stored()), spec);
    }

    #[test]
    fn sixteen_at_once_make_one_key() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::new(dir.path().to_owned());
        let texts: Vec<Vec<u8>> = std::thread::scope(|scope| {
            let made: Vec<_> = (0..16)
                .map(|_| {
                    scope.spawn(|| {
                        let path = user_key(&Os::new(), &layout).expect("made");
                        std::fs::read(path).expect("a file")
                    })
                })
                .collect();
            made.into_iter()
                .map(|thread| thread.join().expect("no panic"))
                .collect()
        });
        assert!(texts.iter().all(|text| text == &texts[0]));
    }

    #[test]
    fn what_is_no_accepted_public_key_is_refused() {
        let good = "# mine\n\nssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIILDrRMjBVl5emmV2wlRlg1LzBMUJFYJNEHmY/zmX6zF me@here";
        let spec = SshSpec::new([good]).expect("a key");
        assert_eq!(spec.keys().len(), 1);
        for (bad, why) in [
            ("", "has none"),
            ("-----BEGIN OPENSSH PRIVATE KEY-----", "private key"),
            ("ssh-ed25519 AAAA", "cannot be used"),
            ("hello", "cannot be used"),
        ] {
            let error = SshSpec::new([bad]).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            assert!(error.in_one_line().contains(why), "{}", error.in_one_line());
        }
    }

    #[test]
    fn paths_are_quoted_for_the_client() {
        let access = SshAccess {
            port: 2200,
            user: "root".to_owned(),
            identity: "/d a/100%/\"x\"".into(),
            known_hosts: "/k".into(),
            alias: "smolvm-1".to_owned(),
        };
        let config = access.config("box");
        assert!(config.starts_with("Host box\n    HostName 127.0.0.1\n    Port 2200\n"));
        assert!(
            config.contains(r#"IdentityFile "/d a/100%%/\"x\"""#),
            "{config}"
        );
    }
}
