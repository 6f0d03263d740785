// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Everything that [`cases`] has, one after the other. For ratios run `ratios`, which takes turns.

mod cases;

use criterion::{Criterion, Throughput};

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for make in cases::all() {
        let mut pair = make();
        let mut group = criterion.benchmark_group(pair.name());
        match pair.unit() {
            ("B", number) => _ = group.throughput(Throughput::Bytes(number)),
            ("commands", number) => _ = group.throughput(Throughput::Elements(number)),
            _ => {}
        }
        group.bench_function("device", |bencher| {
            bencher.iter_custom(|count| pair.device(count))
        });
        group.bench_function(pair.against(), |bencher| {
            bencher.iter_custom(|count| pair.reference(count))
        });
        group.finish();
    }
    criterion.final_summary();
}
