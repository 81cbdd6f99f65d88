//! Findings about search.

use crate::cli::certify::finding::{Found, Status};
use crate::cli::certify::observations::{Exact, LastCursor};

pub(super) fn exact(exact: Exact) -> Found {
    let word: &'static str = exact.into();
    match exact {
        Exact::FoldsCase => Found::new(Status::AsAssumed, "it ignores case", "close-sync compares again")
            .like("exact_value", word),
        Exact::KeepsCase => {
            Found::new(Status::AsAssumed, "it distinguishes case", "close-sync compares again")
                .like("exact_value", word)
        }
        Exact::Words => Found::new(
            Status::Handled,
            "it also finds longer values",
            "close-sync compares again; searches return more rows",
        ),
        Exact::Refused => Found::new(
            Status::Handled,
            "Close refuses it",
            "close-sync searches by phrase and compares again; searches return more rows",
        )
        .like("exact_value", word),
        Exact::FindsNothing => Found::new(
            Status::NotSupported,
            "it does not find the value",
            "close-sync would create a Lead and a Contact with every message; do not run it",
        ),
    }
}

pub(super) fn email_search(finds: bool) -> Found {
    if finds {
        Found::new(Status::AsAssumed, "it does", "people are found by email")
    } else {
        Found::new(
            Status::NotSupported,
            "it does not",
            "people whose address Close has in another case are created again",
        )
    }
}

pub(super) fn descending(is_exact: bool) -> Found {
    let (found, value) = if is_exact { ("every row once", "exact") } else { ("rows are lost", "loses_rows") };
    Found::new(Status::AsAssumed, found, "no consequence").like("descending_cursor", value)
}

pub(super) fn last_cursor(cursor: LastCursor) -> Found {
    let word: &'static str = cursor.into();
    let status = if cursor == LastCursor::Null { Status::AsAssumed } else { Status::Handled };
    Found::new(status, word, "no further search is made").like("last_cursor", word)
}

pub(super) fn search_rows(have_fields: bool) -> Found {
    if have_fields {
        Found::new(Status::AsAssumed, "they do", "a found record needs no other call")
            .like("search_rows", "fields")
    } else {
        Found::new(Status::Handled, "they have only ids", "close-sync reads each found record")
            .like("search_rows", "only_ids")
    }
}

pub(super) fn unknown_selector(is_refused: bool) -> Found {
    if is_refused {
        Found::new(Status::AsAssumed, "it is", "close-sync reads the custom fields again")
            .like("unknown_selector", "refused")
    } else {
        let meaning = "a deleted lookup field is noticed when the custom fields are read again";
        Found::new(Status::Handled, "it is ignored", meaning).like("unknown_selector", "ignored")
    }
}
