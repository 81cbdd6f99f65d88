//! Draws how a backlog drains.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

/// What was seen at one moment.
pub(crate) struct Sample {
    /// In seconds, since the first event was published.
    pub(crate) at: f64,
    /// Events that are not settled.
    pub(crate) backlog: f64,
    /// By group: calls so far, and the rest of the window's budget in percent.
    pub(crate) calls: [f64; 6],
    pub(crate) budget: [f64; 6],
}

/// The window over which calls are averaged, in seconds: that of Close.
const WINDOW: f64 = 8.0;
const SIZE: (u32, u32) = (900, 720);
/// The width of a panel for a width of 1 of its lines: labels take the rest.
const WITH_LABELS: f64 = 1.18;

type Panel<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Line = (String, Vec<(f64, f64)>);

/// Writes an SVG with three panels: the backlog, the calls per second and the budget that is left.
pub(crate) fn draw(
    path: &Path,
    title: &str,
    groups: [&str; 6],
    samples: &[Sample],
) -> Result<(), Box<dyn Error>> {
    let used: Vec<usize> = (0..groups.len())
        .filter(|group| {
            let (first, last) = (samples.first(), samples.last());
            first.zip(last).is_some_and(|(first, last)| last.calls[*group] > first.calls[*group])
        })
        .collect();
    let backlog = samples.iter().map(|sample| (sample.at, sample.backlog)).collect();
    let calls = |group: usize| samples.iter().map(move |sample| (sample.at, rate(samples, sample, group)));
    let budget = |group: usize| samples.iter().map(move |sample| (sample.at, sample.budget[group]));
    let lines = |values: &dyn Fn(usize) -> Vec<(f64, f64)>| -> Vec<Line> {
        used.iter().map(|group| (groups[*group].to_owned(), values(*group))).collect()
    };

    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let panels = root.titled(title, ("sans-serif", 22))?.split_evenly((3, 1));
    let end = samples.last().map_or(1.0, |sample| sample.at);
    panel(&panels[0], "events waiting", end, &[(String::new(), backlog)])?;
    panel(&panels[1], "calls per second", end, &lines(&|group| calls(group).collect()))?;
    panel(&panels[2], "budget left, %", end, &lines(&|group| budget(group).collect()))?;
    root.present()?;
    Ok(())
}

/// Calls per second over the last window.
fn rate(samples: &[Sample], now: &Sample, group: usize) -> f64 {
    let before = samples.iter().rev().find(|sample| sample.at <= now.at - WINDOW).or(samples.first());
    before.map_or(0.0, |before| {
        let seconds = (now.at - before.at).max(1.0);
        (now.calls[group] - before.calls[group]) / seconds
    })
}

fn panel(area: &Panel<'_>, name: &str, end: f64, lines: &[Line]) -> Result<(), Box<dyn Error>> {
    let most = lines.iter().flat_map(|(_, points)| points).map(|(_, value)| *value).fold(1.0, f64::max);
    let mut chart = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..end * WITH_LABELS, 0.0..most * 1.05)?;
    let whole = |value: &f64| format!("{value:.0}");
    let mut mesh = chart.configure_mesh();
    mesh.x_desc("seconds").y_desc(name).x_label_formatter(&whole).y_label_formatter(&whole);
    mesh.y_labels(6).light_line_style(WHITE).draw()?;
    for (number, (label, points)) in lines.iter().enumerate() {
        let style = Palette99::pick(number).stroke_width(2);
        let drawn = chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
        if !label.is_empty() {
            drawn.label(label).legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], style));
        }
    }
    if lines.iter().any(|(label, _)| !label.is_empty()) {
        chart.configure_series_labels().background_style(WHITE).border_style(BLACK.mix(0.2)).draw()?;
    }
    Ok(())
}
