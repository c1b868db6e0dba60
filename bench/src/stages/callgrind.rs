//! What callgrind writes: which function called which, and what that cost.
//!
//! Of its format (the valgrind manual, "Callgrind Format Specification") only what this program asks for: one event, instructions,
//! and one line of position for each cost. Names are given once and then by their number.

use std::collections::BTreeMap;

use anyhow::Context;

/// A function, by its number in the profile.
type Function = u64;

/// Functions, and what their calls cost.
#[derive(Debug, Default)]
pub(super) struct Profile {
    names: BTreeMap<Function, String>,
    /// By caller and called: instructions of the called one, with all that it called.
    calls: BTreeMap<(Function, Function), u64>,
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// A line that is not as the format has it.
    pub(super) fn parse(text: &str) -> anyhow::Result<Profile> {
        let mut profile = Profile::default();
        let (mut of, mut called, mut is_of_call) = (0, 0, false);
        for (number, line) in (1..).zip(text.lines()) {
            let at = || format!("line {number}: {line:?}");
            if let Some(name) = line.strip_prefix("fn=") {
                of = profile.name(name).with_context(at)?;
            } else if let Some(name) = line.strip_prefix("cfn=") {
                called = profile.name(name).with_context(at)?;
            } else if line.starts_with("calls=") {
                is_of_call = true;
            } else if line.starts_with(|first: char| first.is_ascii_digit() || "+-*".contains(first)) {
                let cost: u64 = line.split(' ').nth(1).and_then(|cost| cost.parse().ok()).with_context(at)?;
                if std::mem::take(&mut is_of_call) {
                    let sum: &mut u64 = profile.calls.entry((of, called)).or_default();
                    *sum = sum.checked_add(cost).with_context(at)?;
                }
            }
        }
        Ok(profile)
    }

    /// The number of `(7) name` or `(7)`.
    fn name(&mut self, text: &str) -> Option<Function> {
        let (number, name) = text.strip_prefix('(')?.split_once(')')?;
        let number = number.parse().ok()?;
        if !name.trim().is_empty() {
            self.names.insert(number, name.trim().to_owned());
        }
        Some(number)
    }

    fn is_named(&self, function: Function, part: &str) -> bool {
        self.names.get(&function).is_some_and(|name| name.contains(part))
    }

    /// Instructions that were spent in functions with this in their names, and in all that these called.
    pub(super) fn instructions_within(&self, name: &str) -> u64 {
        let from_outside = |(caller, called): &(Function, Function)| {
            !self.is_named(*caller, name) && self.is_named(*called, name)
        };
        self.calls.iter().filter(|(call, _)| from_outside(call)).map(|(_, cost)| *cost).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
events: Ir

fn=(1) main
10 5
cfn=(2) stage_one
calls=3 20
11 300
cfn=(3) other
calls=1 30
+2 40

fn=(2)
20 100
cfn=(3)
calls=3 30
* 200
";

    #[test]
    fn costs_of_calls_are_summed_by_name() {
        let profile = Profile::parse(TEXT).unwrap();
        assert_eq!(profile.instructions_within("stage_one"), 300);
        assert_eq!(profile.instructions_within("other"), 240);
        assert_eq!(profile.instructions_within("nothing"), 0);
    }

    #[test]
    fn a_call_from_a_function_of_the_same_name_counts_once() {
        let text =
            "fn=(1) main\ncfn=(2) deep_a\ncalls=1 1\n1 50\nfn=(2)\n2 10\ncfn=(3) deep_b\ncalls=1 1\n2 40\n";
        assert_eq!(Profile::parse(text).unwrap().instructions_within("deep"), 50);
    }

    #[test]
    fn what_is_no_profile_is_an_error() {
        for text in ["fn=main\n", "fn=(1) f\n10\n", "fn=(1) f\n10 many\n", "cfn=(x) f\n"] {
            assert!(Profile::parse(text).is_err(), "{text:?}");
        }
    }
}
