//! JSONPath (RFC 9535): parsing the paths and conditions of a mapping, and applying them.
//!
//! The parser reads some conditions in other dialects as something that never holds: `$.plan in ['free']` selects the
//! member `free` of a member named `plan in`. Such a trigger would skip every event. So what the parser reads too freely
//! is refused here, with the notation that works.

use jsonpath_rust::parser::model::{
    Comparable, Comparison, Filter, FilterAtom, FnArg, JpQuery, Literal, Segment, Selector, Test,
    TestFunction,
};
use jsonpath_rust::parser::parse_json_path;
use jsonpath_rust::query::{QueryRef, js_path_process};
use serde_json::Value;

/// Reads a path, `$.traits.title`.
///
/// # Errors
/// What is wrong with it, for the author of the mapping.
pub(super) fn path(text: &str) -> Result<JpQuery, String> {
    parse(text, text).map_err(|hint| {
        let hint = hint.unwrap_or("try `$.traits.title`");
        format!("`{text}` is not a valid JSONPath ({hint})")
    })
}

/// Reads a condition in the notation of filters, `$.type == 'identify'`, as a filter on the children of a value.
///
/// # Errors
/// What is wrong with it, for the author of the mapping.
pub(super) fn condition(text: &str) -> Result<JpQuery, String> {
    parse(&format!("$[?{text}]"), text).map_err(|hint| {
        let hint = hint.unwrap_or("try `$.type == 'identify' && $.traits.email`");
        format!("`{text}` is not a valid condition ({hint})")
    })
}

/// The nodes a path selects.
pub(super) fn nodes<'a>(path: &JpQuery, body: &'a Value) -> Vec<&'a Value> {
    js_path_process(path, body)
        .map(|found| found.into_iter().map(QueryRef::val).collect())
        .unwrap_or_default()
}

/// The query, or the notation that works. `text` is what the operator wrote of it.
fn parse(query: &str, text: &str) -> Result<JpQuery, Option<&'static str>> {
    let code = without_strings(text);
    if let Some(hint) = blank_in_name(&code) {
        return Err(operator(&code).or(Some(hint)));
    }
    let query = parse_json_path(query).map_err(|_| operator(&code).or_else(|| operand(&code)))?;
    match query.segments.iter().find_map(segment) {
        Some(hint) => Err(Some(hint)),
        None => Ok(query),
    }
}

/// The text with its string literals emptied.
fn without_strings(text: &str) -> String {
    let (mut quote, mut escaped) = (None, false);
    let is_code = |c: &char| {
        let Some(open) = quote else {
            quote = Some(*c).filter(|c| matches!(c, '\'' | '"'));
            return true;
        };
        let closes = *c == open && !escaped;
        escaped = *c == '\\' && !escaped;
        quote = quote.filter(|_| !closes);
        closes
    };
    text.chars().filter(is_code).collect()
}

/// Whether two words stand side by side. RFC 9535 has no such place; the parser takes them for one name.
fn blank_in_name(code: &str) -> Option<&'static str> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || !c.is_ascii();
    let mut words = code.split_ascii_whitespace().peekable();
    while let Some(word) = words.next() {
        if word.ends_with(is_name) && words.peek().is_some_and(|next| next.starts_with(is_name)) {
            return Some("write a name with a blank as `$.traits['first name']`");
        }
    }
    None
}

/// The notation that works for an operator or function of another dialect or language.
fn operator(code: &str) -> Option<&'static str> {
    const EQUAL: &str = "write `==` and `!=`: `$.type == 'identify'`";
    const LIST: &str = "compare with each value: `$.traits.plan == 'free' || $.traits.plan == 'pro'`";
    const LOGIC: &str = "write `&&`, `||` and `!`: `$.traits.email && !$.traits.test`";
    const TEXT: &str =
        "write `match($.traits.plan, 'pro.*')` for the whole text, `search(…)` for a part of it";
    const LENGTH: &str = "write `length($.traits.name) > 1` or `count($.traits.tags[*]) > 1`";
    const ABSENT: &str = "write `$.traits.plan == null` for null, `!$.traits.plan` for an absent value";
    let words: Vec<&str> = words(code).collect();
    let has = |known: &[&str]| words.iter().any(|word| known.contains(&word.to_ascii_lowercase().as_str()));
    let is_call = |name: &str| code.contains(&format!(".{name}("));
    let compact: String = code.split_ascii_whitespace().collect::<Vec<_>>().join(" ");
    if compact.contains("=~") || has(&["matches", "like", "contains", "startswith", "endswith", "regex"]) {
        Some(TEXT)
    } else if compact.contains("===")
        || compact.contains("!==")
        || compact.contains("<>")
        || has_single_equal(&compact)
    {
        Some(EQUAL)
    } else if has(&["is", "empty", "exists", "isnull", "isempty"]) {
        Some(ABSENT)
    } else if has(&["in", "nin", "anyof", "any_of", "noneof", "none_of", "subsetof", "subset_of"]) {
        Some(LIST)
    } else if has(&["and", "or", "not"]) {
        Some(LOGIC)
    } else if is_call("length")
        || is_call("size")
        || is_call("count")
        || code.contains("@.length")
        || has(&["size"])
    {
        Some(LENGTH)
    } else {
        None
    }
}

/// The notation that works for a path or a constant.
fn operand(code: &str) -> Option<&'static str> {
    let is_hyphenated = |word: &str| word.starts_with(['$', '@']) && code.contains(&format!("{word}-"));
    if (code.contains("..") || code.contains('*')) && code.contains(['=', '<', '>']) {
        Some("only a path to one value can be compared; for a list write `$.traits.tags[?@ == 'vip']`")
    } else if words(code).any(is_hyphenated) {
        Some("write a name with other characters as `$.traits['first-name']`")
    } else if !code.contains('$') {
        Some("a path starts with `$`: `$.type == 'identify'`")
    } else if words(code).any(|word| word.starts_with(|c: char| c.is_ascii_alphabetic())) {
        Some("write text in quotes, and `true`, `false` and `null` in lower case")
    } else {
        None
    }
}

/// The words and paths of the code. A path is one word, because it may contain any word as a name.
fn words(code: &str) -> impl Iterator<Item = &str> {
    let ends = |c: char| !(c.is_ascii_alphanumeric() || "_.$@".contains(c));
    code.split(ends).filter(|word| !word.is_empty())
}

/// Whether an equals sign stands alone.
fn has_single_equal(code: &str) -> bool {
    let bytes = code.as_bytes();
    let is_operator = |at: Option<&u8>| at.is_some_and(|byte| b"=!<>~".contains(byte));
    (0..bytes.len()).any(|at| {
        let before = at.checked_sub(1).and_then(|before| bytes.get(before));
        bytes[at] == b'=' && !is_operator(before) && !is_operator(bytes.get(at + 1))
    })
}

// What follows walks a query and returns the notation that works, if a part of the query never holds, or always.

fn segment(segment: &Segment) -> Option<&'static str> {
    match segment {
        Segment::Descendant(inner) => self::segment(inner),
        Segment::Selector(inner) => selector(inner),
        Segment::Selectors(all) => all.iter().find_map(selector),
    }
}

fn selector(selector: &Selector) -> Option<&'static str> {
    match selector {
        Selector::Filter(inner) => filter(inner),
        Selector::Name(_) | Selector::Wildcard | Selector::Index(_) | Selector::Slice(..) => None,
    }
}

fn filter(filter: &Filter) -> Option<&'static str> {
    match filter {
        Filter::Or(all) | Filter::And(all) => all.iter().find_map(self::filter),
        Filter::Atom(FilterAtom::Filter { expr, .. }) => self::filter(expr),
        Filter::Atom(FilterAtom::Test { expr, .. }) => test(expr),
        Filter::Atom(FilterAtom::Comparison(of)) => comparison(of),
    }
}

fn test(test: &Test) -> Option<&'static str> {
    match test {
        Test::RelQuery(segments) => segments.iter().find_map(segment),
        Test::AbsQuery(query) => query.segments.iter().find_map(segment),
        Test::Function(call) if test.is_res_bool() => function(call),
        Test::Function(_) => Some("compare the result: `length($.traits.name) > 1`"),
    }
}

fn comparison(comparison: &Comparison) -> Option<&'static str> {
    let constants = "it compares two constants; a path has no quotes: `$.type == 'identify'`";
    let call = |side: &Comparable| match side {
        Comparable::Function(call) => function(call),
        Comparable::Literal(_) | Comparable::SingularQuery(_) => None,
    };
    match comparison.vals() {
        (Comparable::Literal(_), Comparable::Literal(_)) => Some(constants),
        (one, other) => call(one).or_else(|| call(other)),
    }
}

fn function(call: &TestFunction) -> Option<&'static str> {
    match call {
        TestFunction::Length(of) if !is_one_value(of) => {
            Some("`length` takes a path to one value; write `count($.traits.tags[*])` for several")
        }
        TestFunction::Match(_, FnArg::Literal(pattern))
        | TestFunction::Search(_, FnArg::Literal(pattern))
            if !is_pattern(pattern) =>
        {
            Some("the second argument of `match` and `search` must be a valid regular expression in quotes")
        }
        TestFunction::Custom(..)
        | TestFunction::Length(_)
        | TestFunction::Value(_)
        | TestFunction::Count(_)
        | TestFunction::Search(..)
        | TestFunction::Match(..) => None,
    }
}

fn is_one_value(argument: &FnArg) -> bool {
    let is_single =
        |segment: &Segment| matches!(segment, Segment::Selector(Selector::Name(_) | Selector::Index(_)));
    match argument {
        FnArg::Test(test) => match &**test {
            Test::RelQuery(segments) => segments.iter().all(is_single),
            Test::AbsQuery(query) => query.segments.iter().all(is_single),
            Test::Function(_) => true,
        },
        FnArg::Literal(_) | FnArg::Filter(_) => true,
    }
}

fn is_pattern(literal: &Literal) -> bool {
    match literal {
        Literal::String(pattern) => regex::Regex::new(pattern).is_ok(),
        Literal::Int(_) | Literal::Float(_) | Literal::Bool(_) | Literal::Null => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_other_dialects_write_is_refused_with_the_notation_that_works() {
        let cases = [
            ("$.plan in ['free']", "compare with each value"),
            ("$.plan nin ['free', 'pro']", "compare with each value"),
            ("$.plan anyof ['free']", "compare with each value"),
            ("in($.plan, ['free'])", "compare with each value"),
            ("$.type foo", "write a name with a blank"),
            ("$.traits.first name == 'Ada'", "write a name with a blank"),
            ("$.traits\n.email x", "write a name with a blank"),
            ("$.a and $.b", "write `&&`"),
            ("$.a or .b", "write `&&`"),
            ("not $.a", "write `&&`"),
            ("$.type = 'x'", "write `==`"),
            ("$.type === 'x'", "write `==`"),
            ("$.type !== 'x'", "write `==`"),
            ("$.type <> 'x'", "write `==`"),
            ("$.type =~ /x/", "write `match("),
            ("$.type =~ 'x.*'", "write `match("),
            ("$.email contains 'x'", "write `match("),
            ("$.email contains ['x']", "write `match("),
            ("$.email like 'x%'", "write `match("),
            ("$.email startsWith 'x'", "write `match("),
            ("$.a is null", "write `$.traits.plan == null`"),
            ("$.a empty true", "write `$.traits.plan == null`"),
            ("$.tags.length() > 1", "write `length("),
            ("$.tags.size() > 1", "write `length("),
            ("$.tags size 3", "write `length("),
            ("$.a[(@.length-1)]", "write `length("),
            ("$..type == 'x'", "only a path to one value"),
            ("$.tags[*] == 'a'", "only a path to one value"),
            ("$.first-name == 'x'", "write a name with other characters"),
            ("type == 'x'", "a path starts with `$`"),
            ("type", "a path starts with `$`"),
            ("true", "a path starts with `$`"),
            ("$.type == identify", "write text in quotes"),
            ("$.a == True", "write text in quotes"),
            ("'$.type' == 'identify'", "it compares two constants"),
            ("$.a && 'a' != 'b'", "it compares two constants"),
            ("length($.tags)", "compare the result"),
            ("!count($.tags[*])", "compare the result"),
            ("length($.tags[*]) > 1", "`length` takes a path to one value"),
            ("match($.email, '[')", "the second argument of `match`"),
            ("$.a[?search(@, '(')]", "the second argument of `match`"),
            ("$.a] || $[?$.b", "try `$.type == 'identify'"),
            ("$.type == 'x' &&", "try `$.type == 'identify'"),
        ];
        for (text, hint) in cases {
            let error = condition(text).unwrap_err();
            assert!(error.starts_with(&format!("`{text}` is not a valid condition ({hint}")), "{error}");
        }
    }

    #[test]
    fn what_the_standard_allows_is_accepted() {
        for text in [
            "$.type == 'identify' && $.traits.email",
            "$.type == \"a b in c\"",
            "$.type=='it\\'s in here'",
            "$['traits']['Plan Name'] == 'free'",
            "$.traits ['plan'] == 'free'",
            "$ .type == 'x'",
            "!$.type && !($.event || $.in || $.or.and)",
            "$.traits.size == 3 && $.traits.length > 1",
            "$.a == $.b",
            "$.a == null",
            "$..type",
            "$.traits.tags[?@ == 'vip']",
            "$.traits.tags[?(@.a == 1 && @.b)]",
            "length($.traits.name) > 1",
            "count($.traits.tags[*]) >= 2",
            "value($.traits.plan) == 'free'",
            "match($.traits.email, '.*@acme[.]test')",
            "search($.traits.email, $.pattern)",
            "$.traits.größe == 'L'",
        ] {
            assert!(condition(text).is_ok(), "{text}: {:?}", condition(text));
        }
        for text in
            ["$.traits.first name", "$.a in ['x']", "$.traits.items[?@.a b == 1]", "$.tags[(@.length-1)]"]
        {
            assert!(path(text).is_err(), "{text}");
        }
        for text in
            ["$.traits['first name']", "$.traits.items[?@.a == 'b c'].d", "$.tags[-1]", "$.tags[0, 1]", "$"]
        {
            assert!(path(text).is_ok(), "{text}");
        }
    }
}
