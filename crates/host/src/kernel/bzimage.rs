//! The uncompressed kernel out of a bzImage.
//!
//! Offsets are those of the kernel's `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel
//! Header".

use std::io;

/// `HdrS`, at 0x202.
const HEADER_MAGIC: &[u8] = b"HdrS";
/// The first protocol that says where the payload is.
const VERSION_MIN: u16 = 0x0208;

fn corrupt(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// The ELF file of a kernel, and its release as `uname -r` would say it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Vmlinux {
    pub(super) elf: Vec<u8>,
    pub(super) release: String,
}

/// Takes a bzImage or an ELF file.
pub(super) fn extract(image: &[u8]) -> io::Result<Vmlinux> {
    if image.starts_with(b"\x7fELF") {
        return Ok(Vmlinux {
            release: release_in_banner(image).unwrap_or_else(|| "unknown".to_owned()),
            elf: image.to_vec(),
        });
    }
    if image.get(0x202..0x206) != Some(HEADER_MAGIC) {
        return Err(corrupt("it is neither an ELF file nor a bzImage"));
    }
    let u16_at = |at: usize| {
        let bytes = image.get(at..at + 2)?;
        Some(u16::from_le_bytes(bytes.try_into().ok()?))
    };
    let u32_at = |at: usize| {
        let bytes = image.get(at..at + 4)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let short = || corrupt("its header is cut short");
    if u16_at(0x206).ok_or_else(short)? < VERSION_MIN {
        return Err(corrupt("its boot protocol is older than 2.08"));
    }
    // "For backwards compatibility, if the setup_sects field contains 0, the real value is 4."
    let sectors = match image.get(0x1f1).copied().ok_or_else(short)? {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + u32_at(0x248).ok_or_else(short)?;
    let length = u32_at(0x24c).ok_or_else(short)?;
    let payload = start
        .checked_add(length)
        .and_then(|end| image.get(start..end))
        .ok_or_else(|| corrupt("its payload is cut short"))?;
    let elf = if payload.starts_with(b"\x7fELF") {
        payload.to_vec()
    } else {
        super::compressed::unpack(payload)
            .ok_or_else(|| corrupt("its compression is not gzip, xz, zstd or LZ4"))??
    };
    if !elf.starts_with(b"\x7fELF") {
        return Err(corrupt("its payload is not an ELF file"));
    }
    // kernel_version: "a pointer to a NUL-terminated human-readable kernel version number string,
    // less 0x200".
    let release = u16_at(0x20e)
        .filter(|offset| *offset != 0)
        .and_then(|offset| image.get(usize::from(offset) + 0x200..))
        .and_then(first_word)
        .or_else(|| release_in_banner(&elf))
        .unwrap_or_else(|| "unknown".to_owned());
    Ok(Vmlinux { elf, release })
}

/// `linux_banner` in `init/version.c`.
fn release_in_banner(elf: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    let mut rest = elf;
    // The first byte is rare enough for the standard search to be quick.
    while let Some(at) = rest.iter().position(|b| *b == b'L') {
        if rest[at..].starts_with(BANNER) {
            // "%s" is the format with the same beginning, in /proc/version's code.
            if let Some(word) = first_word(&rest[at + BANNER.len()..]).filter(|w| w != "%s") {
                return Some(word);
            }
        }
        rest = &rest[at + 1..];
    }
    None
}

fn first_word(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().take(128).position(|b| *b == b' ' || *b == 0)?;
    let word = std::str::from_utf8(&bytes[..end]).ok()?;
    let plain = |c: char| c.is_ascii_alphanumeric() || "._+-~%".contains(c);
    (!word.is_empty() && word.chars().all(plain)).then(|| word.to_owned())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::kernel::compressed::tests::{pack_all, pack_lz4};

    pub(crate) fn elf() -> Vec<u8> {
        let mut elf = b"\x7fELF".to_vec();
        elf.extend_from_slice(&[0; 2000]);
        elf.extend_from_slice(b"Linux version %s (x) Linux version 6.1.0-9-test (someone)\0");
        elf
    }

    /// A bzImage with one set-up sector beyond the first.
    pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(HEADER_MAGIC);
        image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&16_u32.to_le_bytes());
        let length = u32::try_from(payload.len()).unwrap();
        image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
        image.extend_from_slice(&[0xcc; 16]);
        image.extend_from_slice(payload);
        image.extend_from_slice(b"more code");
        image
    }

    #[test]
    fn the_payload_is_found_whatever_packs_it() {
        for payload in pack_all(&elf()).into_iter().chain([elf()]) {
            let found = extract(&bzimage(&payload)).unwrap();
            assert_eq!(found.elf, elf());
            assert_eq!(found.release, "6.1.0-9-test");
        }
    }

    #[test]
    fn the_header_names_the_release() {
        let mut image = bzimage(&pack_lz4(&elf()));
        image[0x20e..0x210].copy_from_slice(&0x120_u16.to_le_bytes());
        image[0x320..0x32e].copy_from_slice(b"6.9-header #1\0");
        assert_eq!(extract(&image).unwrap().release, "6.9-header");
    }

    #[test]
    fn anything_else_is_refused() {
        let image = bzimage(&pack_lz4(&elf()));
        for bad in [
            b"".to_vec(),
            b"#!/bin/sh".to_vec(),
            image[..0x230].to_vec(),
            image[..1100].to_vec(),
            bzimage(b"neither"),
            bzimage(&pack_lz4(b"not an ELF file")),
        ] {
            let error = extract(&bad).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        }
    }
}
