// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Pages: where they are, and where and how they had better be.

use crate::{Error, Result, uapi};

/// How the GPU gets exclusive access to a page for its atomic operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Atomics {
    /// As the driver chooses. This is the default.
    Auto = uapi::ATOMICS_AUTO,
    /// The page is pinned in place, and the CPU gets it back when it touches it.
    Pin = uapi::ATOMICS_PIN,
    /// The page is made exclusive to the device in place, by `make_device_exclusive`.
    Exclusive = uapi::ATOMICS_EXCLUSIVE,
    /// The page is migrated to VRAM, and back when the CPU touches it.
    Migrate = uapi::ATOMICS_MIGRATE,
    /// Not at all: updates get lost when the CPU updates the same memory. For demonstration.
    Unprotected = uapi::ATOMICS_UNPROTECTED,
}

impl Atomics {
    /// All there are.
    pub const ALL: [Self; 5] = [
        Self::Auto,
        Self::Pin,
        Self::Exclusive,
        Self::Migrate,
        Self::Unprotected,
    ];
}

/// Where pages can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Location {
    /// Wherever they are. This is the default.
    Anywhere = uapi::LOCATION_NONE,
    /// In system memory.
    System = uapi::LOCATION_SYSTEM,
    /// In VRAM, when the GPU uses them, and back when the CPU does.
    Vram = uapi::LOCATION_VRAM,
    /// In the part of VRAM that the CPU can access too, when the GPU uses them.
    Aperture = uapi::LOCATION_APERTURE,
}

impl Location {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Anywhere, Self::System, Self::Vram, Self::Aperture];
}

/// Where a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PageState {
    /// The GPU does not know it.
    Cpu,
    /// The CPU and the GPU may both access it.
    Mirrored,
    /// It is in VRAM; an access by the CPU brings it back.
    Vram,
    /// It is pinned in place for the GPU; the CPU cannot access it.
    Pinned,
    /// It is exclusive to the GPU, in place; the CPU cannot access it.
    Exclusive,
    /// It is in VRAM, where the CPU and the GPU may both access it.
    Coherent,
}

/// What the GPU may do with a page at the moment without asking the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rights {
    /// Read.
    pub read: bool,
    /// Write.
    pub write: bool,
    /// Atomic operations.
    pub atomic: bool,
}

/// The GPU's view of a page of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Page {
    /// Where it is.
    pub state: PageState,
    /// What the GPU may do with it.
    pub rights: Rights,
    /// Size in bytes of the page that the GPU maps there, of which this may be a part; zero if it maps none.
    pub page_size: usize,
    /// The page frame number of the pinned page, for a caller with CAP_SYS_ADMIN.
    pub pfn: Option<u64>,
}

impl Page {
    pub(crate) fn from_raw(raw: &uapi::Page) -> Result<Self> {
        Ok(Self {
            state: match raw.state {
                uapi::PAGE_CPU => PageState::Cpu,
                uapi::PAGE_MIRRORED => PageState::Mirrored,
                uapi::PAGE_VRAM => PageState::Vram,
                uapi::PAGE_PINNED => PageState::Pinned,
                uapi::PAGE_EXCLUSIVE => PageState::Exclusive,
                uapi::PAGE_COHERENT => PageState::Coherent,
                value => {
                    return Err(Error::Unknown {
                        what: "page state",
                        value,
                    });
                }
            },
            rights: Rights {
                read: raw.rights & uapi::RIGHT_READ != 0,
                write: raw.rights & uapi::RIGHT_WRITE != 0,
                atomic: raw.rights & uapi::RIGHT_ATOMIC != 0,
            },
            page_size: raw.page_size as usize,
            pfn: (raw.pfn != 0).then_some(raw.pfn),
        })
    }
}
