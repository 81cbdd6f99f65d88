//! Progress bars.

use indicatif::{ProgressBar, ProgressStyle};

use crate::dead_letters::scan::ScanStep;

/// Printed while another command holds the lock on the dead letters.
pub(super) const WAITING: &str = "another operator is reading or replaying dead letters; waiting";

pub(super) fn scan_bar() -> ProgressBar {
    bar("{msg}{wide_bar} {pos} of {len}, {eta} left")
}

/// A bar that hides itself when standard error is not a terminal.
pub(super) fn bar(template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// Shows the steps of a scan.
pub(super) fn observer(bar: &ProgressBar) -> impl FnMut(ScanStep) + Send {
    let mut is_reported = false;
    move |step| match step {
        ScanStep::Waiting if is_reported => {}
        ScanStep::Waiting => {
            is_reported = true;
            bar.suspend(|| anstream::eprintln!("{WAITING}"));
        }
        ScanStep::Scanned { at, of } => {
            bar.set_length(of.into());
            bar.set_position(at as u64);
        }
    }
}

pub(super) fn report_running_replay(replaying: bool) {
    if replaying {
        anstream::eprintln!("a replay is under way; its messages are not included");
    }
}
