//! Support for tests of the real programs on real machines, and in `tests/e2e` those tests.
//!
//! ```text
//! cargo build --workspace --bins && cargo test -p smolvm-testkit --test e2e
//! ```
//!
//! A test takes a [`Home`], a data directory of its own over a kernel and an image that are prepared
//! once ([`Assets`]), and runs `smolvm` in it as a user would. When the home goes, it checks that
//! nothing is left of any sandbox, and takes away what is. Waiting is done on things that can be
//! watched (the end of a process, a pipe, a directory), each with a limit after which the test says
//! what it waited for; nothing sleeps.
//!
//! | Variable | Meaning |
//! |---|---|
//! | `SMOLVM_TEST_BINARIES` | Directory of `smolvm`, `smolvm-keeper` and `smolvm-agent`; beside the test otherwise |
//! | `SMOLVM_TEST_SMALL` | Set to anything: every test has the small kernel, not only those about it |
//! | `SMOLVM_TEST_DATA` | A prepared data directory; `e2e-data` in the target directory otherwise |

mod assets;
mod binaries;
mod home;
mod images;
mod invocation;
mod lab;
mod machines;
mod terminal;
mod watch;

pub use assets::Assets;
pub use binaries::Binaries;
pub use home::{Home, HomeBuilder, Sandbox};
pub use images::{Entry, Registry, TestImage, digest, targz};
pub use invocation::{Finished, Invocation, Running};
pub use lab::{
    ECHO_PORT, HELLO_PORT, HOST, Lab, METADATA, Namespace, OTHER_SERVER, PRIVATE_SERVER, SERVER,
    may_network,
};
pub use terminal::Terminal;
pub use watch::{Entries, PATIENCE, Process, processes_mentioning};
