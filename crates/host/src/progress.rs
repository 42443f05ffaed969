//! How far a long operation is.

/// What a long operation is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Fetching the lists of packages.
    Update,
    /// Fetching packages.
    Download,
    /// Unpacking packages.
    Unpack,
    /// Running the packages' own set-up, or choosing what is to be compiled.
    Configure,
    /// Compiling.
    Compile,
    /// Writing the result.
    Write,
}

/// How far a long operation is. Of two reports, the later never has the lower fraction or phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// What it is busy with.
    pub phase: Phase,
    /// How much of the whole operation is done, from 0 to `total`. An estimate.
    pub done: u32,
    /// Always [`Progress::TOTAL`].
    pub total: u32,
}

impl Progress {
    /// The whole: `done` is in thousandths.
    pub const TOTAL: u32 = 1000;
}

/// Turns what a phase knows about itself into reports that never go back.
pub(crate) struct Meter<'a> {
    report: &'a mut dyn FnMut(Progress),
    /// Each phase with the thousandth at which it begins, in order.
    begins: &'a [(Phase, u32)],
    last: Option<Progress>,
}

impl std::fmt::Debug for Meter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meter")
            .field("begins", &self.begins)
            .field("last", &self.last)
            .finish_non_exhaustive()
    }
}

impl<'a> Meter<'a> {
    pub(crate) fn new(begins: &'a [(Phase, u32)], report: &'a mut dyn FnMut(Progress)) -> Self {
        Self {
            report,
            begins,
            last: None,
        }
    }

    /// Reports that `phase` is done to `part` of `whole`. Ignored if it would go back or says
    /// nothing new.
    pub(crate) fn at(&mut self, phase: Phase, part: u64, whole: u64) {
        let Some(index) = self.begins.iter().position(|(p, _)| *p == phase) else {
            return;
        };
        let begin = self.begins[index].1;
        let end = self
            .begins
            .get(index + 1)
            .map_or(Progress::TOTAL, |(_, begin)| *begin);
        let whole = whole.max(1);
        let share = u64::from(end - begin) * part.min(whole) / whole;
        let done = begin + u32::try_from(share).unwrap_or(0);
        let next = Progress {
            phase,
            done,
            total: Progress::TOTAL,
        };
        if self.last.is_none_or(|last| {
            (next.phase, next.done) > (last.phase, last.done) && next.phase >= last.phase
        }) {
            self.last = Some(next);
            (self.report)(next);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAN: [(Phase, u32); 3] = [
        (Phase::Update, 0),
        (Phase::Download, 100),
        (Phase::Unpack, 600),
    ];

    proptest! {
        #[test]
        fn reports_never_go_back(steps in prop::collection::vec((0_usize..3, 0_u64..200, 0_u64..200), 0..50)) {
            let mut seen = Vec::new();
            let mut report = |p: Progress| seen.push(p);
            let mut meter = Meter::new(&PLAN, &mut report);
            for (phase, part, whole) in steps {
                meter.at(PLAN[phase].0, part, whole);
            }
            for pair in seen.windows(2) {
                prop_assert!(pair[0].done <= pair[1].done);
                prop_assert!(pair[0].phase <= pair[1].phase);
            }
            prop_assert!(seen.iter().all(|p| p.done <= p.total));
        }
    }
}
