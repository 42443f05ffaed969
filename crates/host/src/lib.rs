//! The Linux host, one effect per function.
//!
//! Files and locks ([`os`]), processes ([`process`]), disk images ([`disk`]), root file systems
//! ([`image`]), OCI images ([`oci`]), guest kernels ([`kernel`]), the initial RAM file system ([`initramfs`]), the
//! network ([`net`]), directories that guests mount ([`share`]), releases of Firecracker ([`firecracker`]) and the programs all this needs ([`packages`]).
//!
//! Nothing here knows what a virtual machine, a sandbox or a database is. Nothing prints, reads
//! the environment or asks the clock for the date: whatever a function needs is an argument. Every
//! function blocks, so asynchronous callers use a blocking thread; only the resolver in [`net::dns`]
//! is asynchronous itself. Long ones take a [`cancel::Cancel`] and a progress callback.
//!
//! Writing goes through [`os::Os`], whose every effect carries a name, so that a test can fail
//! exactly that step.

mod apt;
pub mod cancel;
pub mod cgroup;
mod command;
pub mod disk;
pub mod error;
pub mod firecracker;
mod http;
pub mod image;
pub mod initramfs;
pub mod kernel;
pub mod net;
pub mod oci;
pub mod os;
pub mod packages;
pub mod process;
pub mod progress;
pub mod share;
mod staging;
mod sys;
#[cfg(test)]
mod test_server;

pub use cancel::Cancel;
pub use error::{HostError, HostErrorKind};
pub use os::{Faults, Os};
pub use packages::Programs;
pub use process::ProcessIdentity;
pub use progress::{Phase, Progress};
