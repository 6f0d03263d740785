// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Deliberate defects, with which tests prove that they can fail. They can be switched while the device runs.
//!
//! Each defect has *opportunities*: moments at which it could strike. It lets `after` of them pass, strikes at
//! the next one and then at every `every`th, `count` times in all.

use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// A deliberate defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Defect {
    /// INVALIDATE completes without having done anything. Opportunities: INVALIDATEs.
    StaleTlb,
    /// A fault is not reported. Opportunities: new faults.
    LostFault,
    /// A fault is reported twice. Opportunities: new faults.
    DuplicateFault,
    /// A submission completes before its commands have run. Opportunities: submissions.
    EarlyFence,
    /// A submission never completes. Opportunities: submissions that end.
    LostCompletion,
    /// An access goes to the page behind the right one. Opportunities: pieces of COPY and FILL.
    WrongPage,
    /// A COPY changes a byte on the way. Opportunities: pieces of COPY.
    CorruptCopy,
    /// The driver is not notified. Opportunities: notifications.
    DropInterrupt,
    /// A command never ends. Opportunities: commands.
    HangEngine,
    /// A page of VRAM loses what is in it: it is poisoned until the device is reset. Opportunities: accesses
    /// to VRAM pages.
    EccPoison,
    /// The device resets itself. Opportunities: submissions that begin.
    ResetMidway,
}

impl Defect {
    /// All of them.
    pub const ALL: [Self; 11] = [
        Self::StaleTlb,
        Self::LostFault,
        Self::DuplicateFault,
        Self::EarlyFence,
        Self::LostCompletion,
        Self::WrongPage,
        Self::CorruptCopy,
        Self::DropInterrupt,
        Self::HangEngine,
        Self::EccPoison,
        Self::ResetMidway,
    ];

    /// As it is called on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::StaleTlb => "stale-tlb",
            Self::LostFault => "lost-fault",
            Self::DuplicateFault => "duplicate-fault",
            Self::EarlyFence => "early-fence",
            Self::LostCompletion => "lost-completion",
            Self::WrongPage => "wrong-page",
            Self::CorruptCopy => "corrupt-copy",
            Self::DropInterrupt => "drop-interrupt",
            Self::HangEngine => "hang-engine",
            Self::EccPoison => "ecc-poison",
            Self::ResetMidway => "reset-midway",
        }
    }

    /// The defect called `name`.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|defect| defect.name() == name)
    }

    /// What it does when nothing else is said.
    pub const fn usual(self) -> Injection {
        let (after, every, count) = match self {
            Self::StaleTlb | Self::DuplicateFault => (0, 1, 0),
            Self::LostFault | Self::EarlyFence | Self::LostCompletion => (3, 4, 0),
            Self::WrongPage | Self::CorruptCopy | Self::DropInterrupt => (15, 16, 0),
            Self::HangEngine | Self::EccPoison | Self::ResetMidway => (15, 16, 1),
        };
        Injection {
            defect: self,
            after,
            every,
            count,
        }
    }
}

/// When a defect strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Injection {
    /// Which.
    pub defect: Defect,
    /// Opportunities that it lets pass first.
    pub after: u64,
    /// At every how many opportunities it strikes then; at least one.
    pub every: u64,
    /// How often in all; zero: without end.
    pub count: u64,
}

/// Why a text is no injection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// There is no such defect.
    #[error("there is no defect called {0:?}; there are: {list}", list = Defect::ALL.map(Defect::name).join(", "))]
    Name(String),
    /// There is no such parameter.
    #[error("{0:?} is not one of after=N, every=N, count=N")]
    Parameter(String),
    /// It is not a number.
    #[error("{0:?} needs a number, every= one that is not zero")]
    Number(String),
}

impl FromStr for Injection {
    type Err = ParseError;

    /// From `NAME[:KEY=NUMBER[,KEY=NUMBER]…]`.
    fn from_str(text: &str) -> Result<Self, ParseError> {
        let (name, parameters) = match text.split_once(':') {
            Some((name, parameters)) => (name, Some(parameters)),
            None => (text, None),
        };
        let defect = Defect::by_name(name).ok_or_else(|| ParseError::Name(name.into()))?;
        let mut injection = defect.usual();
        for parameter in parameters.into_iter().flat_map(|list| list.split([',', ':'])) {
            let unknown = || ParseError::Parameter(parameter.into());
            let (key, value) = parameter.split_once('=').ok_or_else(unknown)?;
            let number: u64 = value.parse().map_err(|_| ParseError::Number(parameter.into()))?;
            match key {
                "after" => injection.after = number,
                "every" if number > 0 => injection.every = number,
                "every" => return Err(ParseError::Number(parameter.into())),
                "count" => injection.count = number,
                _ => return Err(unknown()),
            }
        }
        Ok(injection)
    }
}

/// A defect that is switched on, and what it has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Active {
    /// When it strikes.
    pub injection: Injection,
    /// Opportunities so far.
    pub opportunities: u64,
    /// How often it has struck.
    pub strikes: u64,
}

#[derive(Debug, Default)]
struct Slot {
    /// Looked at without the lock, so that a defect that is off costs nothing.
    on: AtomicBool,
    active: Mutex<Option<Active>>,
}

/// Which defects are switched on.
#[derive(Debug, Default)]
pub struct Injector {
    slots: [Slot; Defect::ALL.len()],
}

impl Injector {
    /// With these switched on.
    pub fn new(injections: &[Injection]) -> Self {
        let this = Self::default();
        for injection in injections {
            this.switch_on(*injection);
        }
        this
    }

    fn slot(&self, defect: Defect) -> Option<&Slot> {
        self.slots.get(defect as usize)
    }

    /// Switches a defect on, counting from zero.
    pub fn switch_on(&self, injection: Injection) {
        let Some(slot) = self.slot(injection.defect) else {
            return;
        };
        *slot.active.lock() = Some(Active {
            injection,
            opportunities: 0,
            strikes: 0,
        });
        slot.on.store(true, Ordering::Relaxed);
    }

    /// Switches a defect off. Says whether it was on.
    pub fn switch_off(&self, defect: Defect) -> bool {
        let Some(slot) = self.slot(defect) else {
            return false;
        };
        slot.on.store(false, Ordering::Relaxed);
        slot.active.lock().take().is_some()
    }

    /// What is switched on.
    pub fn active(&self) -> Vec<Active> {
        self.slots.iter().filter_map(|slot| *slot.active.lock()).collect()
    }

    /// This is an opportunity: does the defect strike?
    #[inline]
    pub fn strikes(&self, defect: Defect) -> bool {
        match self.slot(defect) {
            Some(slot) if slot.on.load(Ordering::Relaxed) => slot.strikes(),
            _ => false,
        }
    }
}

impl Slot {
    #[cold]
    fn strikes(&self) -> bool {
        let mut active = self.active.lock();
        let Some(active) = &mut *active else { return false };
        let Injection {
            after, every, count, ..
        } = active.injection;
        let number = active.opportunities;
        active.opportunities = number.saturating_add(1);
        let turn = number
            .checked_sub(after)
            .is_some_and(|number| number.checked_rem(every) == Some(0));
        let strikes = turn && (count == 0 || active.strikes < count);
        active.strikes = active.strikes.saturating_add(strikes.into());
        if strikes {
            log::debug!(
                "injected {}, opportunity {number}",
                active.injection.defect.name()
            );
        }
        strikes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found() {
        for defect in Defect::ALL {
            assert_eq!(Defect::by_name(defect.name()), Some(defect));
            assert_eq!(defect.name().parse(), Ok(defect.usual()));
        }
    }

    #[test]
    fn parameters() {
        let parsed: Injection = "lost-fault:every=2,after=7,count=3".parse().unwrap();
        assert_eq!(
            parsed,
            Injection {
                defect: Defect::LostFault,
                after: 7,
                every: 2,
                count: 3
            }
        );
        for bad in [
            "",
            "lost",
            "lost-fault:",
            "lost-fault:every",
            "lost-fault:every=0",
            "lost-fault:x=1",
            "lost-fault:after=-1",
        ] {
            assert!(bad.parse::<Injection>().is_err(), "{bad}");
        }
    }

    #[test]
    fn strikes_when_it_should() {
        let injector = Injector::default();
        assert!(!injector.strikes(Defect::LostFault));
        injector.switch_on("lost-fault:after=2,every=3,count=2".parse().unwrap());
        let struck: Vec<_> = (0..12).filter(|_| injector.strikes(Defect::LostFault)).collect();
        assert_eq!(struck.len(), 2);
        let active = injector.active();
        assert_eq!(
            (active.len(), active[0].opportunities, active[0].strikes),
            (1, 12, 2)
        );
        assert!(!injector.strikes(Defect::StaleTlb));
        assert!(injector.switch_off(Defect::LostFault));
        assert!(!injector.switch_off(Defect::LostFault));
        injector.switch_on("lost-fault:after=1,every=2".parse().unwrap());
        let pattern: Vec<_> = (0..5).map(|_| injector.strikes(Defect::LostFault)).collect();
        assert_eq!(pattern, [false, true, false, true, false]);
    }
}
