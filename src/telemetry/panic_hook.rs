//! Logs where a panic happened, without its message. The message may quote personal data, and the default hook would
//! print it.

use std::cell::RefCell;
use std::panic;

thread_local! {
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Replaces the default panic hook by one that logs only the location.
pub fn install_hook() {
    panic::set_hook(Box::new(|info| {
        let location = info.location().map_or_else(|| "an unknown location".to_owned(), ToString::to_string);
        tracing::error!(event = "task_panicked", at = location, "task panicked (bug in close-sync)");
        LAST.set(Some(location));
    }));
}

/// The location of the last panic on this thread. Call it right after catching the panic.
pub fn last_location() -> String {
    LAST.take().unwrap_or_else(|| "an unknown location".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_location_is_kept_without_the_message() {
        install_hook();
        let caught = panic::catch_unwind(|| panic!("jane@example.test"));
        let _ = panic::take_hook();
        assert!(caught.is_err());
        let location = last_location();
        assert!(location.starts_with("src/telemetry/panic_hook.rs:"), "{location}");
        assert_eq!(last_location(), "an unknown location");
    }
}
