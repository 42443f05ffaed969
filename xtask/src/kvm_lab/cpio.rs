//! An initial RAM file system: a cpio archive as the kernel reads it
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use anyhow::{Context as _, Result};

/// An archive under construction.
#[derive(Debug, Default)]
pub(super) struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    pub(super) fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, 0o040_755, &[])
    }

    pub(super) fn file(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.entry(name, 0o100_000 | mode, data)
    }

    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(data.len()).with_context(|| format!("{name} is too large"))?;
        let name_size = u32::try_from(name.len() + 1)?;
        // Inode, mode, user, group, links, time, size, two device numbers, and the name's size.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            0,
            0,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_begins_at_a_multiple_of_four() {
        let mut archive = Cpio::default();
        archive.directory("bin").expect("a directory");
        archive.file("bin/ab", 0o755, b"hello").expect("a file");
        let bytes = archive.finish().expect("an archive");
        let header = |text: &[u8], at: usize| bytes[at..].starts_with(text);
        assert!(header(b"070701", 0) && header(b"bin\0", 110));
        let file = 110 + 4 + 2;
        assert_eq!(file % 4, 0);
        assert!(header(b"070701", file) && header(b"bin/ab\0", file + 110));
        // The header and the name have 117 bytes, the data begins at the next multiple.
        assert!(header(b"hello", file + 120));
        assert!(header(b"070701", file + 128));
        assert_eq!(&bytes[file + 14..file + 22], b"000081ed");
    }
}
