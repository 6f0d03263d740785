// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The picture of contention: a line for each mechanism, once for the CPU's increments and once for the GPU's.

use std::fmt::Write as _;

use pinion_tests::measurement::{Contention, Row};

/// Of the whole picture.
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 400.0;
/// Where lines are drawn, from the left edge of a panel and the upper one of the picture.
const LEFT: f64 = 70.0;
const TOP: f64 = 70.0;
const PLOT_WIDTH: f64 = 335.0;
const PLOT_HEIGHT: f64 = 250.0;
const PANEL: f64 = 425.0;

/// A colour that can be told from the others, and seen on white and on black; and a shape for the points.
const STYLES: [(&str, Shape); 3] = [
    ("#2f81f7", Shape::Circle),
    ("#d9822b", Shape::Square),
    ("#3fa34d", Shape::Triangle),
];

#[derive(Clone, Copy)]
enum Shape {
    Circle,
    Square,
    Triangle,
}

/// One of the two parts of the picture.
struct Panel {
    title: &'static str,
    value: fn(&Contention) -> f64,
    /// Where it begins.
    x: f64,
}

/// Draws the rows that are about contention.
pub(crate) fn draw(rows: &[Row]) -> String {
    let points: Vec<&Contention> = rows
        .iter()
        .filter_map(|row| match row {
            Row::Contention(row) => Some(row),
            _ => None,
        })
        .collect();
    let mut mechanisms: Vec<&str> = Vec::new();
    let mut shares: Vec<u32> = Vec::new();
    for point in &points {
        if !mechanisms.contains(&&*point.mechanism) {
            mechanisms.push(&point.mechanism);
        }
        if !shares.contains(&point.percent) {
            shares.push(point.percent);
        }
    }
    let least = points
        .iter()
        .flat_map(|point| [point.cpu, point.gpu])
        .filter(|value| *value > 0.0)
        .fold(0.1, f64::min);
    let scale = Scale {
        decades: -least.log10().floor(),
    };
    let mut out = head();
    for (index, mechanism) in mechanisms.iter().enumerate() {
        let x = LEFT + 130.0 * index as f64;
        let (colour, shape) = STYLES[index % STYLES.len()];
        // Writing to a string does not fail.
        let _ = writeln!(
            out,
            "<line x1=\"{x}\" y1=\"24\" x2=\"{}\" y2=\"24\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            x + 30.0
        );
        out += &marker(shape, colour, x + 15.0, 24.0);
        let _ = writeln!(out, "<text x=\"{}\" y=\"28\">{mechanism}</text>", x + 38.0);
    }
    let panels = [
        Panel {
            title: "Increments of the CPU",
            value: |point| point.cpu,
            x: 0.0,
        },
        Panel {
            title: "Increments of the GPU",
            value: |point| point.gpu,
            x: PANEL,
        },
    ];
    for panel in &panels {
        panel.frame(&mut out, &scale, &shares);
        for (index, mechanism) in mechanisms.iter().enumerate() {
            let line: Vec<_> = points
                .iter()
                .filter(|point| point.mechanism == *mechanism)
                .filter_map(|point| {
                    let place = shares.iter().position(|share| *share == point.percent)?;
                    Some((panel.place(place, shares.len()), scale.y((panel.value)(point))))
                })
                .collect();
            panel.line(&mut out, index, &line);
        }
    }
    out + "</svg>\n"
}

fn head() -> String {
    format!(
        "<!-- SPDX-License-Identifier: Apache-2.0 OR MIT -->\n\
         <svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\">\n\
         <title>Increments by the share of the CPU's that are on the GPU's page</title>\n\
         <style>\n\
         text {{ font: 13px sans-serif; fill: #24292f; }}\n\
         .title {{ font-weight: bold; }}\n\
         .axis {{ stroke: #6e7781; fill: none; }}\n\
         .grid {{ stroke: #6e7781; stroke-opacity: 0.3; }}\n\
         @media (prefers-color-scheme: dark) {{ text {{ fill: #e6edf3; }} }}\n\
         </style>\n"
    )
}

/// Powers of ten, down from 1.
struct Scale {
    decades: f64,
}

impl Scale {
    fn y(&self, value: f64) -> f64 {
        let depth = -value.max(1e-30).log10();
        // A little above 1 there is room.
        TOP + PLOT_HEIGHT * (depth / self.decades).clamp(-0.05, 1.0)
    }
}

impl Panel {
    /// Where the `index`th of so many shares is.
    fn place(&self, index: usize, count: usize) -> f64 {
        let step = PLOT_WIDTH / count.max(1) as f64;
        self.x + LEFT + step * (index as f64 + 0.5)
    }

    fn frame(&self, out: &mut String, scale: &Scale, shares: &[u32]) {
        let (left, bottom) = (self.x + LEFT, TOP + PLOT_HEIGHT);
        let right = left + PLOT_WIDTH;
        let _ = writeln!(
            out,
            "<text class=\"title\" x=\"{left}\" y=\"54\">{}</text>",
            self.title
        );
        for decade in 0..=scale.decades as i32 {
            let value = 10_f64.powi(-decade);
            let y = scale.y(value);
            let label = if decade < 3 {
                format!("{value}")
            } else {
                format!("{value:e}")
            };
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\"/>\n\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                left - 8.0,
                y + 4.0
            );
        }
        let _ = writeln!(out, "<path class=\"axis\" d=\"M{left} {TOP}V{bottom}H{right}\"/>");
        for (index, share) in shares.iter().enumerate() {
            let _ = writeln!(
                out,
                "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{share} %</text>",
                self.place(index, shares.len()),
                bottom + 20.0
            );
        }
        let middle = left + PLOT_WIDTH / 2.0;
        let _ = writeln!(
            out,
            "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">of the CPU's increments are on the GPU's page</text>\n\
             <text transform=\"translate({} {}) rotate(-90)\" text-anchor=\"middle\">1: without exclusion, undisturbed</text>",
            bottom + 44.0,
            self.x + 14.0,
            TOP + PLOT_HEIGHT / 2.0
        );
    }

    fn line(&self, out: &mut String, index: usize, points: &[(f64, f64)]) {
        let (colour, shape) = STYLES[index % STYLES.len()];
        let path: Vec<_> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>",
            path.join(" ")
        );
        for (x, y) in points {
            *out += &marker(shape, colour, *x, *y);
        }
    }
}

fn marker(shape: Shape, colour: &str, x: f64, y: f64) -> String {
    match shape {
        Shape::Circle => format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" fill=\"{colour}\"/>\n"),
        Shape::Square => format!(
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"8\" height=\"8\" fill=\"{colour}\"/>\n",
            x - 4.0,
            y - 4.0
        ),
        Shape::Triangle => format!(
            "<path d=\"M{x:.1} {:.1}l5 9h-10z\" fill=\"{colour}\"/>\n",
            y - 5.5
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(mechanism: &str, percent: u32, cpu: f64, gpu: f64) -> Row {
        Row::Contention(Contention {
            mechanism: mechanism.to_owned(),
            percent,
            cpu,
            gpu,
            cpu_rate: 0.0,
            gpu_rate: 0.0,
            handovers: 0.0,
        })
    }

    #[test]
    fn there_is_a_line_for_each_mechanism_and_side() {
        let rows = [
            point("pin", 0, 1.0, 1.0),
            point("pin", 100, 0.001, 0.5),
            point("migrate", 0, 1.0, 1.0),
            point("migrate", 100, 0.0001, 0.25),
        ];
        let picture = draw(&rows);
        assert_eq!(picture.matches("<polyline").count(), 4);
        assert_eq!(picture.matches(">100 %<").count(), 2);
        assert!(picture.contains(">pin<") && picture.contains(">migrate<"));
        // The axis goes down to where the least value is, which is drawn at its end.
        assert!(picture.contains(">1e-4<") && !picture.contains(">1e-5<"));
        let bottom = format!(",{:.1}\"", TOP + PLOT_HEIGHT);
        assert!(picture.contains(&bottom), "{picture}");
    }

    #[test]
    fn nothing_is_no_division_by_zero() {
        assert!(!draw(&[point("pin", 0, 0.0, 0.0)]).contains("NaN"));
        assert!(!draw(&[]).contains("NaN"));
    }
}
