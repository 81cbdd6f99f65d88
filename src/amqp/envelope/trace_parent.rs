//! The trace that a message belongs to.

/// The header `traceparent` of W3C Trace Context, version 00. Successors keep the header unchanged, so that a trace
/// continues through delay queues and replays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceParent(String);

impl TraceParent {
    /// Parses the header. A malformed one is ignored and never reaches the logs.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let hex = |part: &str, digits: usize| {
            part.len() == digits && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
        };
        let nonzero = |part: &str, digits| hex(part, digits) && part.bytes().any(|b| b != b'0');
        match parts[..] {
            // A later version may append parts; the four keep their meaning.
            [version, trace, span, flags, ..]
                if hex(version, 2)
                    && version != "ff"
                    && (version != "00" || parts.len() == 4)
                    && nonzero(trace, 32)
                    && nonzero(span, 16)
                    && hex(flags, 2) =>
            {
                Some(Self(text.to_owned()))
            }
            _ => None,
        }
    }

    /// 32 hexadecimal digits.
    pub fn trace_id(&self) -> &str {
        &self.0[3..35]
    }

    /// The producer's span, 16 hexadecimal digits.
    pub fn span_id(&self) -> &str {
        &self.0[36..52]
    }

    /// Whether the producer's span is exported.
    pub fn is_sampled(&self) -> bool {
        u8::from_str_radix(&self.0[53..55], 16).is_ok_and(|flags| flags & 1 == 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_well_formed_traceparent_is_accepted() {
        let (trace, span) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
        for good in [format!("00-{trace}-{span}-01"), format!("cc-{trace}-{span}-00-later")] {
            let parsed = TraceParent::parse(&good).unwrap();
            assert_eq!((parsed.trace_id(), parsed.span_id()), (trace, span));
            assert_eq!(parsed.is_sampled(), good.ends_with("01"));
        }
        let zeros = "0".repeat(32);
        for bad in [
            String::new(),
            format!("00-{trace}-{span}"),
            format!("00-{trace}-{span}-01-more"),
            format!("ff-{trace}-{span}-01"),
            format!("00-{}-{span}-01", trace.to_uppercase()),
            format!("00-{zeros}-{span}-01"),
            format!("00-{trace}-{}-01", &zeros[..16]),
            format!("00-{trace}-jane@example.com-01"),
        ] {
            assert_eq!(TraceParent::parse(&bad), None, "{bad}");
        }
    }
}
