//! Progress of long work on standard error: a bar on a terminal, a few plain lines elsewhere.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use smolvm_engine::{Progress, Watcher};

use crate::output::{self, Output};
use crate::units;

/// Percent between two plain lines of one phase.
const PLAIN_STEP: u32 = 20;

/// Units of a whole bar.
const BAR_LENGTH: u32 = 1000;

/// Shows the progress of one piece of work.
#[derive(Debug)]
pub(crate) struct Meter {
    face: Face,
    phase: String,
    phase_began: Instant,
    phases: Vec<(String, Duration)>,
}

#[derive(Debug)]
enum Face {
    Silent,
    Plain {
        percent: u32,
    },
    Bar {
        bar: ProgressBar,
        /// Whether it shows that nobody knows how much there is to come.
        open: Option<bool>,
    },
}

/// How a bar looks, and how it looks where nobody knows how much there is to come.
const STYLES: [&str; 2] = ["{msg} {wide_bar:.dim} {percent:>3}%", "{spinner} {msg}"];

impl Meter {
    /// A meter that shows as much as this output wants.
    pub(crate) fn new(out: Output, stderr_terminal: bool) -> Self {
        let face = if out.quiet || out.json {
            Face::Silent
        } else if stderr_terminal {
            let bar = ProgressBar::with_draw_target(
                Some(BAR_LENGTH.into()),
                ProgressDrawTarget::stderr_with_hz(10),
            );
            Face::Bar { bar, open: None }
        } else {
            Face::Plain { percent: 0 }
        };
        Self {
            face,
            phase: String::new(),
            phase_began: Instant::now(),
            phases: Vec::new(),
        }
    }

    /// Shows bytes that are copied.
    pub(crate) fn bytes(&mut self, phase: &str, done: u64, total: Option<u64>) {
        // A copy that ends between two blinks needs no plain lines.
        if matches!(self.face, Face::Plain { .. }) && self.phase_began.elapsed().as_secs() < 2 {
            return;
        }
        #[expect(
            clippy::cast_precision_loss,
            reason = "a bar does not show the difference"
        )]
        let fraction = total
            .filter(|total| *total > 0)
            .map(|total| done as f64 / total as f64);
        let mut detail = units::show_bytes(done);
        if let Some(total) = total {
            detail = format!("{detail} of {}", units::show_bytes(total));
        }
        if phase == self.phase && self.phase_began.elapsed().as_millis() >= 500 {
            let millis = self.phase_began.elapsed().as_millis();
            let rate = u64::try_from(u128::from(done) * 1000 / millis).unwrap_or(u64::MAX);
            detail = format!("{detail}, {}/s", units::show_bytes(rate));
        }
        self.show(phase, fraction, &detail);
    }

    /// Shows that a part of the work is under way.
    pub(crate) fn show(&mut self, phase: &str, fraction: Option<f64>, detail: &str) {
        let new = phase != self.phase;
        if new {
            self.end_phase();
            phase.clone_into(&mut self.phase);
            self.phase_began = Instant::now();
        }
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped to the bar's length"
        )]
        let position =
            fraction.map(|done| (done.clamp(0.0, 1.0) * f64::from(BAR_LENGTH)).round() as u32);
        let text = if detail.is_empty() {
            phase.to_owned()
        } else {
            format!("{phase} ({detail})")
        };
        match &mut self.face {
            Face::Silent => {}
            Face::Plain { percent } => {
                let now = position.unwrap_or(0) * 100 / BAR_LENGTH;
                if new || now >= *percent + PLAIN_STEP {
                    *percent = now;
                    if position.is_some() {
                        output::stderr(&format!("{now:>3}% {text}"));
                    } else {
                        output::stderr(&text);
                    }
                }
            }
            Face::Bar { bar, open } => {
                let unknown = position.is_none();
                if open.replace(unknown) != Some(unknown)
                    && let Ok(style) = ProgressStyle::with_template(STYLES[usize::from(unknown)])
                {
                    bar.set_style(style);
                }
                bar.set_message(text);
                bar.set_position(position.unwrap_or(0).into());
            }
        }
    }

    fn end_phase(&mut self) {
        if !self.phase.is_empty() {
            self.phases
                .push((std::mem::take(&mut self.phase), self.phase_began.elapsed()));
        }
    }

    /// Takes the bar away and gives how long each phase took.
    pub(crate) fn finish(mut self) -> Vec<(String, Duration)> {
        self.end_phase();
        if let Face::Bar { bar, .. } = &self.face {
            bar.finish_and_clear();
        }
        self.phases
    }
}

impl Watcher for Meter {
    fn progress(&mut self, progress: &Progress) {
        // Two tasks may have a phase of the same name.
        let phase = format!("{}: {}", progress.task, progress.phase);
        self.show(&phase, progress.fraction, "");
    }
}
