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
//! | `files`, `extract`, `list` | trees out, trees in, listings |
//! | `birth`, `facts`, `shutdown` | identity, state, the way down |
//! | `sys` | everything that needs `unsafe` |

#![cfg_attr(not(test), no_main)]

mod birth;
mod cgroup;
mod cmdline;
mod command;
mod console;
mod devices;
mod exec;
mod extract;
mod facts;
mod failure;
mod files;
mod init;
mod list;
mod port;
mod reap;
mod serve;
mod shutdown;
mod stream;
mod sys;
mod users;
mod workers;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

/// Runs the program; [`sys`] calls it from the C entry point.
///
/// As process 1 it boots and never returns. Otherwise it understands one form, which the tests of
/// this crate use: `--serve-fd N [--cgroups DIRECTORY]` serves the protocol on an inherited socket
/// without mounting anything, and ends when the peer closes it.
fn run(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    sys::prepare_signals();
    if rustix::process::getpid().is_init() {
        return init::boot();
    }
    let mut serve_fd = None;
    let mut cgroups = None;
    while let Some(argument) = arguments.next() {
        let value = arguments.next();
        match (argument.to_str(), value) {
            (Some("--serve-fd"), Some(value)) => {
                serve_fd = value.to_str().and_then(|text| text.parse().ok());
            }
            (Some("--cgroups"), Some(value)) => cgroups = Some(PathBuf::from(value)),
            _ => return usage(),
        }
    }
    let Some(fd) = serve_fd.and_then(sys::inherited_fd) else {
        return usage();
    };
    let prepared = rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .and_then(|()| rustix::io::ioctl_fionbio(&fd, true))
        .and_then(|()| rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC));
    if let Err(error) = prepared {
        console::say(&format!("cannot serve on the inherited socket: {error}"));
        return ExitCode::FAILURE;
    }
    let agent = serve::Agent::new(
        cgroups.and_then(|directory| cgroup::Cgroups::new(&directory)),
        None,
    );
    serve::until_closed(&Arc::new(agent), &Arc::new(fd));
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    console::say("this program is the first process of a SmolVM guest; it is not run by hand");
    ExitCode::from(2)
}
