// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The GPUs of a machine.

use std::path::{Path, PathBuf};

use crate::{Error, Gpu, Result};

/// A GPU that can be opened.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device {
    number: u32,
    path: PathBuf,
}

impl Device {
    /// All GPUs of this machine, in the order of their numbers.
    ///
    /// # Errors
    ///
    /// What the system says of `/dev`.
    pub fn all() -> Result<Vec<Self>> {
        Self::below(Path::new("/dev"))
    }

    fn below(directory: &Path) -> Result<Vec<Self>> {
        let open = |source| Error::Open {
            path: directory.to_owned(),
            source,
        };
        let mut devices = Vec::new();
        for entry in std::fs::read_dir(directory).map_err(open)? {
            let name = entry.map_err(open)?.file_name();
            let number = name.to_str().and_then(|name| name.strip_prefix("pinion"));
            if let Some(number) = number.and_then(|number| number.parse().ok()) {
                let path = directory.join(&name);
                devices.push(Self { number, path });
            }
        }
        devices.sort();
        Ok(devices)
    }

    /// The number in its name.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens an address space on it.
    ///
    /// # Errors
    ///
    /// [`Error::Open`], with what the system says.
    pub fn open(&self) -> Result<Gpu> {
        Gpu::open(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_found_by_name_and_sorted_by_number() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["pinion10", "pinion9", "pinion", "pinionx", "null"] {
            std::fs::write(directory.path().join(name), "").unwrap();
        }
        let found = Device::below(directory.path()).unwrap();
        assert_eq!(found.iter().map(Device::number).collect::<Vec<_>>(), [9, 10]);
        assert_eq!(found[0].path(), directory.path().join("pinion9"));
    }
}
