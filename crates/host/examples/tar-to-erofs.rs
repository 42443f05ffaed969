//! Writes the tar stream on standard input as an EROFS image: for the KVM lab, which puts its disks
//! together with it.
//!
//! Argument: the image, which must not exist.

use std::error::Error;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

use smolvm_host::image::erofs::{Special, write_erofs};

fn main() -> Result<(), Box<dyn Error>> {
    let image = std::env::args_os().nth(1).map(PathBuf::from);
    let file = File::create_new(image.ok_or("which image?")?)?;
    let stdin = BufReader::with_capacity(1 << 16, std::io::stdin().lock());
    write_erofs(stdin, &file, Special::default())?;
    Ok(())
}
