//! The medians as a picture: one group of bars for each metric, one bar for each way, on a
//! logarithmic scale.

use std::path::Path;

use plotters::prelude::*;

use crate::report::CliError;

/// Pixels.
const SIZE: (u32, u32) = (960, 420);

/// The least that is drawn, in milliseconds: a logarithmic scale has no zero.
const LEAST_MS: f64 = 0.1;

/// Draws, for each way, the medians of all metrics in milliseconds.
///
/// # Errors
///
/// If the file cannot be written.
pub(super) fn write(
    path: &Path,
    ways: &[(&str, Vec<(&'static str, f64)>)],
) -> Result<(), CliError> {
    let mut text = String::new();
    draw(&mut text, ways)
        .map_err(|error| CliError::io("drawing the plot", std::io::Error::other(error)))?;
    std::fs::write(path, text)
        .map_err(|error| CliError::io(format!("writing {}", path.display()), error))
}

fn draw(text: &mut String, ways: &[(&str, Vec<(&'static str, f64)>)]) -> Result<(), String> {
    let failed = |error: DrawingAreaErrorKind<_>| error.to_string();
    let Some((_, first)) = ways.first() else {
        return Ok(());
    };
    let groups = i32::try_from(first.len()).map_err(|error| error.to_string())?;
    let width = i32::try_from(ways.len()).map_err(|error| error.to_string())? + 1;
    let most = ways
        .iter()
        .flat_map(|(_, medians)| medians.iter().map(|(_, ms)| *ms))
        .fold(1.0, f64::max);

    let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
    area.fill(&WHITE).map_err(failed)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(
            "Life of a sandbox: medians, in milliseconds",
            ("sans-serif", 18),
        )
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(60)
        .build_cartesian_2d(0..groups * width, (LEAST_MS..most * 2.0).log_scale())
        .map_err(failed)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .disable_x_axis()
        .y_label_formatter(&|ms| format!("{ms}"))
        .draw()
        .map_err(failed)?;
    for (index, (name, medians)) in (0..).zip(ways) {
        let color = Palette99::pick(usize::try_from(index).unwrap_or(0)).to_rgba();
        let bars = (0..).zip(medians).map(|(group, (_, ms))| {
            let left = group * width + index;
            Rectangle::new(
                [(left, LEAST_MS), (left + 1, ms.max(LEAST_MS))],
                color.filled(),
            )
        });
        chart
            .draw_series(bars)
            .map_err(failed)?
            .label(*name)
            .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 10, y + 5)], color.filled()));
    }
    let names = (0..).zip(first).map(|(group, (name, _))| {
        Text::new(
            (*name).to_owned(),
            (group * width, LEAST_MS * 1.3),
            ("sans-serif", 13).into_font(),
        )
    });
    chart.draw_series(names).map_err(failed)?;
    chart
        .configure_series_labels()
        .background_style(WHITE)
        .border_style(BLACK)
        .draw()
        .map_err(failed)?;
    area.present().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_and_metric_is_in_the_picture() {
        let ways = [
            ("cold", vec![("ready", 1500.0), ("next", 8.0)]),
            ("pool", vec![("ready", 6.0), ("next", 0.0)]),
        ];
        let mut text = String::new();
        draw(&mut text, &ways).expect("a picture");
        for word in ["<svg", "cold", "pool", "ready", "next", "milliseconds"] {
            assert!(text.contains(word), "{word} is not in {text}");
        }
        // The background, four bars, two of the legend and its frame.
        assert!(text.matches("<rect").count() >= 7, "{text}");
    }
}
