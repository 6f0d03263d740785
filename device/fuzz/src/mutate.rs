// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A small mutator, for where there is no libFuzzer. The same seed gives the same inputs.

/// Random numbers (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Numbers that `seed` leads to.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: usize) -> usize {
        // The upper bits are the better ones.
        ((self.number() >> 32) % end as u64) as usize
    }
}

/// Numbers at which things tend to change.
const EDGES: [u64; 12] = [
    0,
    1,
    7,
    0x7f,
    0xff,
    0x100,
    0xfff,
    0x1000,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 48,
    u64::MAX,
];

/// Something like `seed`, of at most `most` bytes, with pieces of `other` perhaps.
pub fn mutate(random: &mut Random, seed: &[u8], other: &[u8], most: usize) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len() + 1);
        let length = 1 + random.below(16);
        match random.below(8) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.number() as u8,
            2 => {
                let new: Vec<_> = (0..length).map(|_| random.number() as u8).collect();
                bytes.splice(at..at, new);
            }
            3 => _ = bytes.drain(at..bytes.len().min(at + length)),
            4 => {
                let edge = EDGES[random.below(EDGES.len())].to_le_bytes();
                let width = [1, 2, 4, 8][random.below(4)];
                let end = bytes.len().min(at + width);
                bytes.splice(at..end, edge[..width].iter().copied());
            }
            5 => {
                let end = bytes.len().min(at + 4 * length);
                let again = bytes[at..end].to_vec();
                let to = random.below(bytes.len() + 1);
                bytes.splice(to..to, again);
            }
            6 if !other.is_empty() => {
                let from = random.below(other.len());
                let piece = &other[from..other.len().min(from + 4 * length)];
                let end = if random.below(2) == 0 { at } else { bytes.len() };
                bytes.splice(at..end, piece.iter().copied());
            }
            _ if at < bytes.len() => {
                bytes[at] = bytes[at].wrapping_add(if random.below(2) == 0 { 1 } else { 255 })
            }
            _ => bytes.push(random.number() as u8),
        }
    }
    bytes.truncate(most);
    bytes
}

/// Calls `run` with `tries` inputs that are made from `corpus`, or until it says no.
pub fn explore(
    corpus: &[Vec<u8>],
    most: usize,
    seed: u64,
    tries: u64,
    mut run: impl FnMut(u64, &[u8]) -> bool,
) {
    let mut random = Random::new(seed);
    // What is tried becomes a seed now and then, so that one gets further away from the corpus.
    let mut pool: Vec<Vec<u8>> = corpus.to_vec();
    pool.push(Vec::new());
    for number in 0..tries {
        let seed = &pool[random.below(pool.len())];
        let other = &pool[random.below(pool.len())];
        let bytes = mutate(&mut random, seed, other, most);
        if !run(number, &bytes) {
            return;
        }
        if random.below(8) == 0 {
            if pool.len() < corpus.len() + 256 {
                pool.push(bytes);
            } else {
                let at = corpus.len() + random.below(256);
                pool[at] = bytes;
            }
        }
    }
}
