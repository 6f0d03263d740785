// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What ATOMICs do to numbers, and semaphores ask of them.

use pinion_abi as abi;

use super::status::Error;

/// Width of an atomic operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Width {
    /// 32 bits.
    W4,
    /// 64 bits.
    W8,
}

impl Width {
    /// The width of `bytes` bytes.
    pub fn decode(bytes: u8) -> Result<Self, Error> {
        match bytes {
            4 => Ok(Self::W4),
            8 => Ok(Self::W8),
            _ => Err(Error::Invalid),
        }
    }

    /// The bits of a number of this width.
    pub const fn mask(self) -> u64 {
        match self {
            Self::W4 => 0xffff_ffff,
            Self::W8 => u64::MAX,
        }
    }

    /// The width in bytes.
    pub const fn bytes(self) -> u64 {
        match self {
            Self::W4 => 4,
            Self::W8 => 8,
        }
    }
}

/// An operation on a number in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the abi::ATOMIC_* of the same name")]
pub enum Operation {
    Add,
    And,
    Or,
    Xor,
    MinUnsigned,
    MaxUnsigned,
    MinSigned,
    MaxSigned,
    Exchange,
    CompareExchange,
    Load,
    Store,
}

impl Operation {
    /// The operation with this number.
    pub fn decode(operation: u8) -> Result<Self, Error> {
        Ok(match operation {
            abi::ATOMIC_ADD => Self::Add,
            abi::ATOMIC_AND => Self::And,
            abi::ATOMIC_OR => Self::Or,
            abi::ATOMIC_XOR => Self::Xor,
            abi::ATOMIC_MIN_UNSIGNED => Self::MinUnsigned,
            abi::ATOMIC_MAX_UNSIGNED => Self::MaxUnsigned,
            abi::ATOMIC_MIN_SIGNED => Self::MinSigned,
            abi::ATOMIC_MAX_SIGNED => Self::MaxSigned,
            abi::ATOMIC_EXCHANGE => Self::Exchange,
            abi::ATOMIC_COMPARE_EXCHANGE => Self::CompareExchange,
            abi::ATOMIC_LOAD => Self::Load,
            abi::ATOMIC_STORE => Self::Store,
            _ => return Err(Error::Unsupported),
        })
    }

    /// `ACCESS_*`: what the page has to allow. A single load or store is one on any bus and needs no more.
    pub const fn access(self) -> u8 {
        match self {
            Self::Load => abi::ACCESS_READ,
            Self::Store => abi::ACCESS_WRITE,
            _ => abi::ACCESS_READ | abi::ACCESS_WRITE | abi::ACCESS_ATOMIC,
        }
    }

    /// What the number `old` becomes, as 64 bits.
    pub fn apply64(self, old: u64, operand: u64, compare: u64) -> u64 {
        match self {
            Self::Add => old.wrapping_add(operand),
            Self::And => old & operand,
            Self::Or => old | operand,
            Self::Xor => old ^ operand,
            Self::MinUnsigned => old.min(operand),
            Self::MaxUnsigned => old.max(operand),
            Self::MinSigned => (old as i64).min(operand as i64) as u64,
            Self::MaxSigned => (old as i64).max(operand as i64) as u64,
            Self::Exchange | Self::Store => operand,
            Self::CompareExchange if old == compare => operand,
            Self::CompareExchange | Self::Load => old,
        }
    }

    /// What the number `old` becomes, as 32 bits.
    pub fn apply32(self, old: u32, operand: u32, compare: u32) -> u32 {
        match self {
            Self::MinSigned => (old as i32).min(operand as i32) as u32,
            Self::MaxSigned => (old as i32).max(operand as i32) as u32,
            // The low half of these depends on the low halves only.
            _ => self.apply64(old.into(), operand.into(), compare.into()) as u32,
        }
    }
}

/// `repeat` atomic operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Atomic {
    /// What to do.
    pub operation: Operation,
    /// On how wide a number.
    pub width: Width,
    /// How often; not zero.
    pub repeat: u32,
    /// On how many different places; not zero.
    pub span: u32,
    /// Bytes from one place to the next.
    pub stride: u32,
    /// The first place.
    pub address: u64,
    /// The operand.
    pub operand: u64,
    /// What compare-exchange compares with.
    pub compare: u64,
    /// Where values that were found go.
    pub write_back: Option<WriteBack>,
}

/// Where an ATOMIC stores what it finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteBack {
    /// What the last operation found goes here.
    Last(u64),
    /// What each operation found goes here, one behind the other.
    All(u64),
}

impl Atomic {
    /// The place of operation number `index`. It is inside the address space: that was checked.
    pub fn place(&self, index: u32) -> u64 {
        let place = u64::from(index.checked_rem(self.span).unwrap_or(0));
        self.address.wrapping_add(place.wrapping_mul(self.stride.into()))
    }

    /// How many bytes from the place of operation `index` on the operations go before they return to the first
    /// place, if they leave no page out.
    pub fn reach(&self, index: u32) -> u64 {
        if u64::from(self.stride) > abi::PAGE_SIZE {
            return self.width.bytes();
        }
        let place = index.checked_rem(self.span).unwrap_or(0);
        let last = self
            .span
            .min(place.saturating_add(self.repeat.saturating_sub(index)));
        let steps = u64::from(last.saturating_sub(place).saturating_sub(1));
        steps
            .saturating_mul(self.stride.into())
            .saturating_add(self.width.bytes())
    }
}

/// How a semaphore's value is compared with the operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is the abi::COMPARE_* of the same name")]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
}

impl Comparison {
    /// The comparison with this number.
    pub fn decode(operation: u8) -> Result<Self, Error> {
        Ok(match operation {
            abi::COMPARE_EQUAL => Self::Equal,
            abi::COMPARE_NOT_EQUAL => Self::NotEqual,
            abi::COMPARE_LESS => Self::Less,
            abi::COMPARE_LESS_EQUAL => Self::LessEqual,
            abi::COMPARE_GREATER => Self::Greater,
            abi::COMPARE_GREATER_EQUAL => Self::GreaterEqual,
            _ => return Err(Error::Unsupported),
        })
    }

    /// Whether `value` is to `operand` as this says.
    pub const fn holds(self, value: u64, operand: u64) -> bool {
        match self {
            Self::Equal => value == operand,
            Self::NotEqual => value != operand,
            Self::Less => value < operand,
            Self::LessEqual => value <= operand,
            Self::Greater => value > operand,
            Self::GreaterEqual => value >= operand,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations() {
        use Operation::*;
        let minus_one = u64::MAX;
        assert_eq!(Add.apply64(minus_one, 2, 0), 1);
        assert_eq!(MinUnsigned.apply64(minus_one, 2, 0), 2);
        assert_eq!(MinSigned.apply64(minus_one, 2, 0), minus_one);
        assert_eq!(MaxSigned.apply32(u32::MAX, 2, 0), 2);
        assert_eq!(MinSigned.apply32(u32::MAX, 2, 0), u32::MAX);
        assert_eq!(Add.apply32(u32::MAX, 2, 0), 1);
        assert_eq!(CompareExchange.apply32(5, 9, 5), 9);
        assert_eq!(CompareExchange.apply64(5, 9, 6), 5);
        assert_eq!(Exchange.apply64(5, 9, 6), 9);
        assert_eq!(Store.apply64(5, 9, 0), 9);
        assert_eq!(Load.apply32(5, 9, 0), 5);
    }

    #[test]
    fn comparisons() {
        use Comparison::*;
        let holds: Vec<[bool; 3]> = [Equal, NotEqual, Less, LessEqual, Greater, GreaterEqual]
            .iter()
            .map(|comparison| [1, 2, u64::MAX].map(|value| comparison.holds(value, 2)))
            .collect();
        assert_eq!(
            holds,
            [
                [false, true, false],
                [true, false, true],
                [true, false, false],
                [true, true, false],
                [false, false, true],
                [false, true, true],
            ]
        );
    }

    #[test]
    fn places_and_how_far_they_reach() {
        let atomic = Atomic {
            operation: Operation::Add,
            width: Width::W8,
            repeat: 10,
            span: 4,
            stride: 16,
            address: 0x1000,
            operand: 1,
            compare: 0,
            write_back: None,
        };
        assert_eq!((atomic.place(3), atomic.place(6)), (0x1030, 0x1020));
        assert_eq!((atomic.reach(0), atomic.reach(3), atomic.reach(9)), (56, 8, 8));
        let far = Atomic {
            stride: 8192,
            ..atomic
        };
        assert_eq!(far.reach(0), 8);
    }
}
