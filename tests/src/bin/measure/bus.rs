// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What has crossed the bus, as the driver has counted it (`/sys/kernel/debug/pinionN/queues`).

use std::fs;
use std::path::{Path, PathBuf};

use pinion_tests::Failure;

/// Where the driver counts.
#[derive(Clone, Debug)]
pub(crate) struct Bus(PathBuf);

/// How often the driver has told the device that there is something for it, since it was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kicks {
    /// Of the queues on which it then waits for the answers to all that it has just sent: a round trip each.
    pub(crate) round_trips: u64,
    /// Of all queues.
    pub(crate) all: u64,
}

impl Kicks {
    /// What has come since.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            round_trips: self.round_trips - earlier.round_trips,
            all: self.all - earlier.all,
        }
    }
}

impl Bus {
    /// That of a device.
    pub(crate) fn of(device: &Path) -> Result<Self, Failure> {
        let name = device.file_name().ok_or("the device has no name")?;
        let this = Self(Path::new("/sys/kernel/debug").join(name).join("queues"));
        this.kicks()?;
        Ok(this)
    }

    /// The counts.
    pub(crate) fn kicks(&self) -> Result<Kicks, Failure> {
        let text = fs::read_to_string(&self.0).map_err(|error| format!("{}: {error}", self.0.display()))?;
        parse(&text).ok_or_else(|| format!("{}: {text}", self.0.display()).into())
    }
}

fn parse(text: &str) -> Option<Kicks> {
    let mut lines = text.lines();
    let names: Vec<_> = lines.next()?.split_whitespace().collect();
    let column = |wanted| names.iter().position(|name| *name == wanted);
    let (name, kicks) = (column("name")?, column("kicks")?);
    let mut sum = Kicks::default();
    let mut known = 0;
    for line in lines {
        let fields: Vec<_> = line.split_whitespace().collect();
        let count: u64 = fields.get(kicks)?.parse().ok()?;
        sum.all += count;
        if matches!(*fields.get(name)?, "control" | "invalidate" | "copy") {
            sum.round_trips += count;
            known += 1;
        }
    }
    (known == 3).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kicks_are_added_up() {
        let text = "queue name slots sent answered kicks full\n0 control 24 9 9 5 0\n1 invalidate 24 1 1 1 0\n\
                    2 event 128 130 0 4 0\n3 ring 64 7 7 7 0\n4 copy 16 2 2 2 0\n";
        assert_eq!(
            parse(text),
            Some(Kicks {
                round_trips: 8,
                all: 19
            })
        );
        assert_eq!(parse(&text.replace("copy", "ring")), None);
    }
}
