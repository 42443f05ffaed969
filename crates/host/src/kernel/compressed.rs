//! Undoing the compression of kernels and modules.

use std::io::{self, Read};

/// The most a kernel or module may unpack to: 1 GiB, far above any, so that a broken file cannot
/// take the host's memory.
const BYTES_MAX: u64 = 1 << 30;
/// LZ4's legacy format: blocks of at most 8 MiB unpacked, each with its packed length before it.
const LZ4_BLOCK_BYTES: usize = 8 << 20;

fn corrupt(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Unpacks `bytes` by their magic number: gzip, xz, zstd or LZ4's legacy format, the ones
/// distributions use. `None` if it is none of them.
///
/// The kernel's build appends the unpacked length, four bytes, to most formats (`size_append` in
/// `scripts/Makefile.lib`), so what follows the compressed stream is ignored.
pub(super) fn unpack(bytes: &[u8]) -> Option<io::Result<Vec<u8>>> {
    Some(match bytes {
        [0x1f, 0x8b, ..] => drain(flate2::read::GzDecoder::new(bytes)),
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => drain(liblzma::read::XzDecoder::new(bytes)),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ruzstd::decoding::StreamingDecoder::new(bytes)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
            .and_then(drain),
        [0x02, 0x21, 0x4c, 0x18, rest @ ..] => lz4_legacy(rest),
        _ => return None,
    })
}

fn drain(reader: impl Read) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    reader.take(BYTES_MAX + 1).read_to_end(&mut output)?;
    if output.len() as u64 > BYTES_MAX {
        return Err(corrupt("it unpacks to more than 1 GiB"));
    }
    Ok(output)
}

/// See `doc/lz4_Frame_format.md` of LZ4, "Legacy frame".
fn lz4_legacy(mut rest: &[u8]) -> io::Result<Vec<u8>> {
    let mut output = Vec::new();
    let mut block = vec![0; LZ4_BLOCK_BYTES];
    // What is left of four bytes or fewer is the appended length.
    while let Some((length, tail)) = rest.split_first_chunk::<4>().filter(|(_, t)| !t.is_empty()) {
        let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
        let Some((packed, tail)) = tail.split_at_checked(length) else {
            return Err(corrupt("an LZ4 block is cut short"));
        };
        let n = lz4_flex::block::decompress_into(packed, &mut block)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        output.extend_from_slice(&block[..n]);
        if output.len() as u64 > BYTES_MAX {
            return Err(corrupt("it unpacks to more than 1 GiB"));
        }
        rest = tail;
    }
    Ok(output)
}

#[cfg(test)]
pub(super) mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    pub(crate) fn pack_lz4(bytes: &[u8]) -> Vec<u8> {
        let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
        for block in bytes.chunks(LZ4_BLOCK_BYTES) {
            let block = lz4_flex::block::compress(block);
            packed.extend_from_slice(&u32::try_from(block.len()).unwrap().to_le_bytes());
            packed.extend_from_slice(&block);
        }
        packed
    }

    pub(crate) fn pack_all(bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(bytes).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 0);
        xz.write_all(bytes).unwrap();
        vec![
            gzip.finish().unwrap(),
            xz.finish().unwrap(),
            ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest),
            pack_lz4(bytes),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn every_format_comes_back(bytes in prop::collection::vec(any::<u8>(), 1..100_000), repeat in 1_usize..100) {
            let bytes = bytes.repeat(repeat);
            for mut packed in pack_all(&bytes) {
                prop_assert!(unpack(&packed).unwrap().unwrap() == bytes);
                packed.extend_from_slice(&u32::try_from(bytes.len()).unwrap().to_le_bytes());
                prop_assert!(unpack(&packed).unwrap().unwrap() == bytes);
            }
        }

        #[test]
        fn nonsense_is_an_error_not_a_panic(format in 0_usize..4, at in 0_usize..10_000, byte: u8) {
            let mut packed = pack_all(&b"some text, again and again. ".repeat(50)).swap_remove(format);
            let at = at % packed.len();
            packed[at] ^= byte;
            drop(unpack(&packed));
            drop(unpack(&packed[..at]));
        }
    }

    #[test]
    fn the_unknown_is_left_alone() {
        assert!(unpack(b"\x7fELF").is_none());
        assert!(unpack(b"").is_none());
    }
}
