//! Where a panic happened, without what it said: the message of a panic may quote personal data, and
//! the default hook would print it.

use std::cell::RefCell;
use std::panic;

thread_local! {
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Replaces the hook that prints panics by one that logs only their place.
pub fn install_hook() {
    panic::set_hook(Box::new(|info| {
        let place = info.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
        tracing::error!(at = place, "a defect of close-sync: a task panicked");
        LAST.set(Some(place));
    }));
}

/// The place of the last panic on this thread: right after catching one, that is the one.
pub fn last_location() -> String {
    LAST.take().unwrap_or_else(|| "an unknown place".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_kept_and_the_words_are_not() {
        install_hook();
        let caught = panic::catch_unwind(|| panic!("jane@example.test"));
        let _ = panic::take_hook();
        assert!(caught.is_err());
        let place = last_location();
        assert!(place.starts_with("src/telemetry/panic_hook.rs:"), "{place}");
        assert_eq!(last_location(), "an unknown place");
    }
}
