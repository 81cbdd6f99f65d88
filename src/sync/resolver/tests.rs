//! The resolver's order of look-ups, on records in memory.

use futures_util::FutureExt;
use serde_json::{Value, json};

use crate::close::in_memory::InMemoryRecords;
use crate::domain::decision::Decision;
use crate::domain::event::Event;
use crate::domain::mapping::tests::mapping;
use crate::domain::matching::{Case, Verdict};
use crate::domain::record::LeadId;
use crate::domain::switches::Switches;
use crate::sync::id_cache::IdCache;
use crate::sync::lookups::Lookups;
use crate::sync::resolver::Resolver;
use crate::sync::version_cache::VersionCache;

fn lead(id: &str, date_created: &str, company_id: Option<&str>) -> Value {
    json!({"id": id, "date_created": date_created, "name": id, "custom.cf_company": company_id})
}

fn contact(id: &str, lead_id: &str, user_id: Option<&str>) -> Value {
    json!({"id": id, "lead_id": lead_id, "date_created": "2026-01-01", "custom.cf_user": user_id,
        "emails": [{"type": "office", "email": "jane@acme.test"}]})
}

/// Decides about Jane of Acme.
fn decide(records: &InMemoryRecords, id_cache: &IdCache) -> Decision {
    let mapping = mapping();
    let body = json!({"type": "identify", "userId": "u1",
        "traits": {"email": "jane@acme.test", "company": {"id": "acme"}}});
    let desired = mapping.apply(&Event { body }).unwrap();
    let mut decision = Decision::default();
    let mut resolver = Resolver {
        lookups: Lookups {
            records,
            id_cache,
            keys: &mapping.keys,
            search_is_complete: true,
            decision: &mut decision,
        },
        version_cache: &VersionCache::default(),
        switches: Switches::default(),
    };
    resolver.decide(&desired, &[]).now_or_never().unwrap().unwrap();
    decision
}

fn verdict(decision: &Decision, id: &str) -> Option<Verdict> {
    decision.candidates.iter().find(|candidate| candidate.id == id).map(|candidate| candidate.verdict)
}

#[test]
fn a_cached_lead_that_is_gone_is_forgotten_and_searched_again() {
    let records = InMemoryRecords::read(&[lead("lead_1", "2026-01-01", Some("acme"))], &[]);
    let id_cache = IdCache::default();
    id_cache.remember_lead("acme", LeadId::new("lead_gone"));
    let decision = decide(&records, &id_cache);
    assert_eq!(verdict(&decision, "lead_gone"), Some(Verdict::Gone));
    assert_eq!(verdict(&decision, "lead_1"), Some(Verdict::SameCompany));
    assert_eq!(id_cache.lead("acme"), Some(LeadId::new("lead_1")));
}

#[test]
fn the_older_of_two_leads_is_the_companys() {
    let leads = [lead("lead_new", "2026-02-01", Some("acme")), lead("lead_old", "2026-01-01", Some("acme"))];
    let decision = decide(&InMemoryRecords::read(&leads, &[]), &IdCache::default());
    assert_eq!(verdict(&decision, "lead_old"), Some(Verdict::SameCompany));
    assert_eq!(verdict(&decision, "lead_new"), Some(Verdict::YoungerLead));
}

#[test]
fn the_persons_lead_without_a_company_id_is_adopted() {
    let leads = [lead("lead_1", "2026-01-01", None)];
    let records = InMemoryRecords::read(&leads, &[contact("cont_1", "lead_1", Some("u1"))]);
    assert_eq!(decide(&records, &IdCache::default()).case, Some(Case::AdoptedLead));
}

#[test]
fn a_contact_with_the_email_and_another_user_id_is_left_alone() {
    let leads = [lead("lead_1", "2026-01-01", None)];
    let records = InMemoryRecords::read(&leads, &[contact("cont_1", "lead_1", Some("u2"))]);
    let decision = decide(&records, &IdCache::default());
    assert_eq!(decision.case, Some(Case::NoMatch));
    assert_eq!(verdict(&decision, "cont_1"), Some(Verdict::DifferentPerson));
}
