// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the CPU's page table says about a page of the process (`Documentation/admin-guide/mm/pagemap.rst`).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use pinion_client::PAGE_SIZE;

/// What is mapped at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing.
    None,
    /// A page of system memory, with its page frame number.
    Present(u64),
    /// Something that the CPU cannot access, such as a device-private page.
    Absent,
}

/// The entry for the page that an address is in. Needs CAP_SYS_ADMIN.
///
/// # Errors
///
/// What the system says, or that it does not tell page frame numbers.
pub fn entry<T>(address: *const T) -> io::Result<Entry> {
    Ok(entries(address, 1)?[0])
}

/// The entries for that many pages, from the one that an address is in. Needs CAP_SYS_ADMIN.
///
/// # Errors
///
/// As [`entry`].
pub fn entries<T>(address: *const T, pages: usize) -> io::Result<Vec<Entry>> {
    let mut bytes = vec![0; pages * 8];
    let offset = (address.addr() / PAGE_SIZE * 8) as u64;
    File::open("/proc/self/pagemap")?.read_exact_at(&mut bytes, offset)?;
    let number = |bytes: &[u8]| {
        let mut number = [0; 8];
        number.copy_from_slice(bytes);
        u64::from_ne_bytes(number)
    };
    bytes.chunks_exact(8).map(|bytes| decode(number(bytes))).collect()
}

fn decode(entry: u64) -> io::Result<Entry> {
    let pfn = entry & ((1 << 55) - 1);
    if entry >> 63 & 1 == 1 {
        if pfn == 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "pagemap hides page frame numbers",
            ));
        }
        Ok(Entry::Present(pfn))
    } else if entry >> 62 & 1 == 1 {
        Ok(Entry::Absent)
    } else {
        Ok(Entry::None)
    }
}

/// The page frame number of a page that must be mapped.
///
/// # Errors
///
/// As [`entry`], or that it is not mapped.
pub fn pfn<T>(address: *const T) -> io::Result<u64> {
    match entry(address)? {
        Entry::Present(pfn) => Ok(pfn),
        other => Err(io::Error::other(format!(
            "{address:p} is not mapped but {other:?}"
        ))),
    }
}
