//! Making a machine this one and no other: name, clock, randomness, defaults.

use std::io::Write;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec};
use smolvm_proto::message::{Birth, Failure, FailureKind};

use crate::command::Defaults;
use crate::failure::{failure, from_errno, from_io};
use crate::network;
use crate::serve::Agent;
use crate::stream::Last;
use crate::sys;
use crate::volumes;
use std::os::fd::AsFd;

/// Replaced where the image has one (machine-id(5)), as the default image has; one that has none gets none.
const MACHINE_ID: &str = "/etc/machine-id";

/// Changes each time the machine becomes another one.
const GENERATION: &str = "/run/smolvm/generation";
const GENERATION_DIR: &str = "/run/smolvm";

/// Longest host name Linux takes (`__NEW_UTS_LEN`).
const HOSTNAME_BYTES_MAX: usize = 64;

/// Carries the request out. Every step that fails fails the whole: a machine that is not itself
/// must not be used.
pub(crate) fn birth(agent: &Agent, request: &Birth) -> Result<Last, Failure> {
    check(&request.hostname)?;
    if agent.disks.is_some() {
        set_clock(request.wall_clock_ns)?;
        add_entropy(&request.entropy)?;
        if request.same != Some(true) {
            become_another(&request.hostname, request.machine_id.as_deref())?;
        }
        if let Some(network) = &request.network {
            network::configure(network)?;
        }
        if let Some(volumes) = &request.volumes {
            volumes::mount_all(volumes)?;
        }
    }
    agent.set_defaults(Defaults {
        env: request.env.clone(),
        cwd: request.cwd.as_ref().map(|cwd| cwd.to_vec()),
        user: request.user.clone(),
    });
    Ok(Last::done())
}

/// Name and identifiers, and word of them to whoever watches.
fn become_another(name: &str, machine_id: Option<&str>) -> Result<(), Failure> {
    rustix::system::sethostname(name.as_bytes())
        .map_err(|errno| from_errno("setting the host name", errno))?;
    write("/etc/hostname", &format!("{name}\n"))?;
    let hosts = std::fs::read("/etc/hosts")
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let new = hosts_with(&hosts, name);
    if new != hosts {
        write("/etc/hosts", &new)?;
    }
    if Path::new(MACHINE_ID).exists() {
        let id = match machine_id {
            Some(id) => id.to_owned(),
            None => random_id()?,
        };
        write(MACHINE_ID, &format!("{id}\n"))?;
    }
    // Programs that keep randomness of their own cannot be told otherwise: the kernel's generator is
    // renewed above, theirs is a copy of another machine's. Whoever watches this file (inotify(7))
    // learns that the machine has become another one.
    match rustix::fs::mkdir(GENERATION_DIR, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(from_errno(&format!("making {GENERATION_DIR}"), errno)),
    }
    write(GENERATION, &format!("{}\n", random_id()?))
}

/// What hostname(7) allows, so that the name cannot break the files it is written to.
fn check(name: &str) -> Result<(), Failure> {
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    if name.len() <= HOSTNAME_BYTES_MAX && name.split('.').all(is_label) {
        Ok(())
    } else {
        Err(failure(
            FailureKind::InvalidInput,
            format!(
                "setting the host name: {name:?} is not one (letters, digits and hyphens, \
                 at most {HOSTNAME_BYTES_MAX})"
            ),
        ))
    }
}

fn set_clock(wall_clock_ns: u64) -> Result<(), Failure> {
    let time = Timespec {
        tv_sec: i64::try_from(wall_clock_ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(wall_clock_ns % 1_000_000_000).unwrap_or(0),
    };
    rustix::time::clock_settime(ClockId::Realtime, time)
        .map_err(|errno| from_errno("setting the clock", errno))
}

fn add_entropy(bytes: &[u8]) -> Result<(), Failure> {
    if bytes.is_empty() {
        return Ok(());
    }
    let doing = "adding the host's random bytes to the kernel's";
    let random = rustix::fs::open(
        "/dev/urandom",
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|errno| from_errno(doing, errno))?;
    // A mere write would be mixed in some time later, and until then copies of one machine would have
    // the same random numbers (random(4)). Such a machine must not be used.
    sys::add_entropy(random.as_fd(), bytes).map_err(|errno| from_errno(doing, errno))
}

/// An identifier in the form of machine-id(5). The kernel's generator has the host's bytes by now, so
/// copies of one machine differ.
fn random_id() -> Result<String, Failure> {
    let mut id = [0u8; 16];
    rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
        .map_err(|errno| from_errno("asking the kernel for random bytes", errno))?;
    Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes a file without cutting it to nothing first: ext4 takes that for a replacement that has to
/// be on the disk when the file is closed (ext4(5), `auto_da_alloc`), and the caller waits.
pub(crate) fn write(path: &str, text: &str) -> Result<(), Failure> {
    let failed = |error: std::io::Error| from_io(&format!("writing {path}"), &error);
    let mut file = std::fs::File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    file.set_len(text.len() as u64).map_err(failed)
}

/// The hosts file with a line for this machine, as Debian's installer writes it, in place of the
/// one an earlier birth wrote.
fn hosts_with(old: &str, name: &str) -> String {
    let mut lines: Vec<&str> = old
        .lines()
        .filter(|line| line.split_ascii_whitespace().next() != Some("127.0.1.1"))
        .collect();
    if !lines
        .iter()
        .any(|line| line.split_ascii_whitespace().next() == Some("127.0.0.1"))
    {
        lines.insert(0, "127.0.0.1 localhost");
    }
    let own = format!("127.0.1.1 {name}");
    lines.push(&own);
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_file_keeps_what_it_says() {
        let first = hosts_with("127.0.0.1 localhost\n10.0.0.1 db # ours\n", "one");
        assert_eq!(
            first,
            "127.0.0.1 localhost\n10.0.0.1 db # ours\n127.0.1.1 one\n"
        );
        assert_eq!(
            hosts_with(&first, "two"),
            "127.0.0.1 localhost\n10.0.0.1 db # ours\n127.0.1.1 two\n"
        );
        assert_eq!(
            hosts_with("", "one"),
            "127.0.0.1 localhost\n127.0.1.1 one\n"
        );
    }

    #[test]
    fn a_name_cannot_break_the_files_it_is_written_to() {
        for good in ["a", "box-1", "sandbox_2.example"] {
            assert!(check(good).is_ok(), "{good}");
        }
        for bad in ["", "a b", "a\n10.0.0.1 evil", "-a", "a..b", &"x".repeat(65)] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
    }
}
