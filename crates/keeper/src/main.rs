//! The keeper with every engine there is. See the library.

use std::process::ExitCode;

use smolvm_vmm::Backend;
use smolvm_vmm::firecracker::Firecracker;
use smolvm_vmm::qemu::Qemu;

fn main() -> ExitCode {
    smolvm_keeper::main(|name| match name {
        "qemu" => Some(Box::new(Qemu) as Box<dyn Backend>),
        "firecracker" => Some(Box::new(Firecracker)),
        _ => None,
    })
}
