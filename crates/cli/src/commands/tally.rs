//! What became of several things that were named: each for itself.

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::output;
use crate::report::CliError;

/// The names, and what became of them so far.
#[derive(Debug)]
pub(super) struct Tally {
    names: Vec<String>,
    /// With which it went well, in the order they were named.
    pub(super) done: Vec<String>,
    /// With which it did not: name and error.
    pub(super) failed: Vec<Value>,
    only: Option<CliError>,
}

impl Tally {
    /// Of these names, each once.
    pub(super) fn of(given: &[String]) -> Self {
        let mut names = Vec::new();
        for name in given {
            if !names.contains(name) {
                names.push(name.clone());
            }
        }
        Self {
            names,
            done: Vec::new(),
            failed: Vec::new(),
            only: None,
        }
    }

    /// The names.
    pub(super) fn names(&self) -> Vec<String> {
        self.names.clone()
    }

    /// Tells what became of one.
    pub(super) fn note<E>(
        &mut self,
        cx: &Context,
        name: String,
        result: Result<(), E>,
    ) -> Result<(), CliError>
    where
        CliError: From<E>,
    {
        match result {
            Ok(()) => {
                cx.out.line(&name)?;
                self.done.push(name);
            }
            Err(error) => {
                let error = CliError::from(error);
                self.failed
                    .push(json!({ "name": name, "error": error.json() }));
                if self.names.len() == 1 {
                    self.only = Some(error);
                } else if !cx.out.json {
                    output::stderr_raw(&error.text());
                }
            }
        }
        Ok(())
    }

    /// The command's outcome: of one name, its own error says all there is to say.
    pub(super) fn outcome(self, data: Value, what: &str) -> Outcome {
        let error = self.only.or_else(|| {
            (!self.failed.is_empty()).then(|| {
                CliError::Partly(format!(
                    "{} of {} {what}",
                    self.failed.len(),
                    self.names.len()
                ))
            })
        });
        Outcome { data, error }
    }
}
