//! PID 1 inside a SmolVM guest.
//!
//! Started from the initramfs, it loads modules, assembles the root file system, switches to it
//! ([`init`]), and then answers the host's requests on one virtio port until the machine is
//! switched off ([`serve`]). Threads and blocking calls, no runtime: under emulation every system
//! call and every context switch shows.
//!
//! | file | what it does |
//! |---|---|
//! | `init`, `cmdline`, `devices` | from the kernel's hand-over to a root file system and a port |
//! | `port`, `stream`, `serve`, `workers` | frames, flow control, one session for each request |
//! | `exec`, `command`, `users`, `cgroup`, `reap` | commands and their ends |
//! | `connect`, `listen`, `datagrams` | sockets of the guest, joined to streams |
//! | `files`, `extract`, `list` | trees out, trees in, listings |
//! | `sftp` | a server of the SSH file transfer protocol, in a process of its own |
//! | `birth`, `network`, `facts`, `shutdown` | identity, addresses, state, the way down |
//! | `sys` | everything that needs `unsafe` |

#![cfg_attr(not(test), no_main)]

mod birth;
mod cgroup;
mod cmdline;
mod command;
mod connect;
mod console;
mod datagrams;
mod devices;
mod exec;
mod extract;
mod facts;
mod failure;
mod files;
mod grow;
mod init;
mod list;
mod listen;
mod mount;
mod network;
mod port;
mod reap;
mod serve;
mod sftp;
mod shutdown;
mod stream;
mod sys;
mod users;
mod volumes;
mod workers;

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Resource, Rlimit};

/// Runs the program; [`sys`] calls it from the C entry point.
///
/// As process 1 it boots and never returns. Otherwise it understands two forms. `--sftp HOME` serves file
/// transfers on standard input and output: the agent starts that in a process of its own, as the user
/// whose files they are. `--serve-stdin [--cgroups DIRECTORY]`, which the tests of this crate use,
/// serves the protocol on the socket that is its standard input, without mounting anything, and ends
/// when the peer closes it.
fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    sys::prepare_signals();
    sys::look_up_hosts_by_ourselves();
    // Standard error leads nowhere in a guest.
    std::panic::set_hook(Box::new(|panic| console::say(&panic.to_string())));
    if rustix::process::getpid().is_init() {
        return init::boot();
    }
    let first = arguments.next();
    if first
        .as_ref()
        .is_some_and(|first| first == sftp::WORD.to_str().unwrap_or_default())
    {
        return match arguments.next() {
            Some(home) => sftp::run(home.into()),
            None => usage(),
        };
    }
    if first.is_none_or(|first| first != "--serve-stdin") {
        return usage();
    }
    let cgroups = match (arguments.next(), arguments.next()) {
        (None, None) => None,
        (Some(option), Some(directory)) if option == "--cgroups" => Some(directory),
        _ => return usage(),
    };
    let socket = match take_stdin() {
        Ok(socket) => Arc::new(socket),
        Err(error) => {
            console::say(&format!("cannot serve on standard input: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let cgroups = cgroups.and_then(|directory| cgroup::Cgroups::new(Path::new(&directory)));
    let agent = Arc::new(serve::Agent::new(cgroups, None));
    serve::until_closed(&agent, &socket, serve::OnLoss::EndCommands);
    shutdown::kill_everyone(&agent.reaper);
    ExitCode::SUCCESS
}

/// Makes the standard input a socket to serve on, and this process one that orphans come to.
fn take_stdin() -> rustix::io::Result<OwnedFd> {
    let limits = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limits.maximum,
            maximum: limits.maximum,
        },
    )?;
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(null)?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    Ok(socket)
}

fn usage() -> ExitCode {
    console::say("this program is the first process of a SmolVM guest; it is not run by hand");
    ExitCode::from(2)
}
