//! Kernels of a few dozen bytes, so that the contract is tested in milliseconds and needs no kernel
//! of anybody's.
//!
//! Each is an ELF file with a PVH note: the VMM loads it and jumps to it in 32-bit protected mode,
//! without paging (`xen/include/public/arch-x86/hvm/start_info.h` of the Xen project).

use super::Guest;

/// Where the code is loaded: above the first MiB, which belongs to the firmware.
const LOADED_AT: u32 = 0x10_0000;

/// `XEN_ELFNOTE_PHYS32_ENTRY`, the note that holds the PVH entry point.
const PHYS32_ENTRY: u32 = 18;

/// File offsets: the ELF header, two program headers, the note, the code.
const PROGRAM_HEADERS: u32 = 64;
const NOTE: u32 = PROGRAM_HEADERS + 2 * 56;
const NOTE_BYTES: u32 = 12 + 4 + 8;
const CODE: u32 = NOTE + NOTE_BYTES;

/// The kernel that behaves as `guest`.
#[must_use]
pub fn kernel(guest: Guest) -> Vec<u8> {
    let code = code(guest);
    let size = u64::try_from(code.len()).unwrap_or(u64::MAX);
    let mut elf = Elf(Vec::new());

    // The ELF header: 64 bit, little endian, an executable for x86-64.
    elf.bytes(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    elf.half(2).half(62).word(1);
    elf.long(u64::from(LOADED_AT))
        .long(u64::from(PROGRAM_HEADERS))
        .long(0);
    elf.word(0)
        .half(64)
        .half(56)
        .half(2)
        .half(0)
        .half(0)
        .half(0);

    // What to load (PT_LOAD, readable, writable, executable), and where the note is (PT_NOTE).
    elf.word(1).word(7).long(u64::from(CODE));
    elf.long(u64::from(LOADED_AT)).long(u64::from(LOADED_AT));
    elf.long(size).long(size).long(1);
    elf.word(4).word(4).long(u64::from(NOTE)).long(0).long(0);
    elf.long(u64::from(NOTE_BYTES))
        .long(u64::from(NOTE_BYTES))
        .long(4);

    elf.word(4).word(8).word(PHYS32_ENTRY).bytes(b"Xen\0");
    elf.long(u64::from(LOADED_AT));
    debug_assert_eq!(elf.0.len(), CODE as usize);
    elf.bytes(&code);
    elf.0
}

/// Writes the guest's line to the first serial port, then does what that guest does.
fn code(guest: Guest) -> Vec<u8> {
    let ending: &[u8] = match guest {
        // cli; 1: hlt; jmp 1b
        Guest::Halts => &[0xfa, 0xf4, 0xeb, 0xfd],
        // mov ecx, 20000; 1: loop 1b; jmp start
        Guest::Ticks => &[0xb9, 0x20, 0x4e, 0, 0, 0xe2, 0xfe, 0xeb, 0xd7],
        // 1: lidt [rest of this, zeros]; int3 -- an exception without a table is a triple fault
        Guest::Resets => &[
            0x0f, 0x01, 0x1d, 0x2a, 0, 0x10, 0, 0xcc, 0x90, 0x90, 0, 0, 0, 0, 0, 0,
        ],
        Guest::Counts => &[
            0xba, 0xfd, 0x03, 0, 0,    // 20: mov edx, 0x3fd        line status
            0xec, //                       25: in al, dx
            0xa8, 0x01, //                     test al, 1            a byte there?
            0x74, 0xfb, //                     jz 25
            0xb2, 0xf8, //                     mov dl, 0xf8          data
            0xec, //                           in al, dx
            0xfe, 0x05, 0, 0, 0x30, 0, //      inc byte [0x300000]   a page of its own
            0xa0, 0, 0, 0x30, 0, //            mov al, [0x300000]
            0x04, b'0', //                     add al, '0'
            0xa2, 0x4f, 0, 0x10, 0, //         mov [line], al
            0xc6, 0x05, 0x50, 0, 0x10, 0, b'\n', // mov byte [line + 1], '\n'
            0xc6, 0x05, 0x51, 0, 0x10, 0, 0, // mov byte [line + 2], 0
            0xeb, 0xb1, //                     jmp start
        ],
    };
    let mut code = Elf(Vec::new());
    let line_at = 0x20 + u32::try_from(ending.len()).unwrap_or(0);
    code.bytes(&[0xbe]).word(LOADED_AT + line_at); //  start: mov esi, line
    code.bytes(&[
        0xac, //                        5: lodsb
        0x84, 0xc0, //                     test al, al
        0x74, 0x16, //                     jz 20
        0x88, 0xc3, //                     mov bl, al
        0xba, 0xfd, 0x03, 0, 0,    //         mov edx, 0x3fd        line status
        0xec, //                       11: in al, dx
        0xa8, 0x20, //                     test al, 0x20         room for a byte?
        0x74, 0xfb, //                     jz 11
        0xba, 0xf8, 0x03, 0, 0, //         mov edx, 0x3f8        data
        0x88, 0xd8, //                     mov al, bl
        0xee, //                           out dx, al
        0xeb, 0xe5, //                     jmp 5
    ]); //                             20:
    debug_assert_eq!(code.0.len(), 0x20);
    code.bytes(ending)
        .bytes(guest.line().as_bytes())
        .bytes(b"\n\0");
    code.0
}

/// Little-endian fields, one after the other.
struct Elf(Vec<u8>);

impl Elf {
    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn half(&mut self, value: u16) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    fn word(&mut self, value: u32) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }

    fn long(&mut self, value: u64) -> &mut Self {
        self.bytes(&value.to_le_bytes())
    }
}
