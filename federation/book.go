package federation

import (
	"fmt"
	"maps"
	"slices"
	"time"
)

// TombstoneLife is how long a left record is kept and exported.
const TombstoneLife = 30 * 24 * time.Hour

// Introductions: what a Peer object says about members that this peer introduces.
const (
	IntroductionsAccept = "accept"
	IntroductionsAsk    = "ask"
	IntroductionsRefuse = "refuse"
)

// Entry is what a Book keeps of one member.
type Entry struct {
	Record   Record
	Direct   bool    // its own export has been read: from now on only that changes bundle, addresses and gateways
	Via      string  // member ID by whose word it is here; empty if by this cluster's own
	Held     bool    // introduced, and waiting for a person
	Proposed *Record // a left record by someone whose word is not enough; waiting for a person
}

// Live reports whether the member counts: traffic, trust and mirror.
func (e *Entry) Live() bool { return e.Record.Standing == Joined && !e.Held }

// Book is who is in the mesh, as one cluster knows it, this cluster included. Its methods decide; the caller stores what changed.
// It is not safe for concurrent use.
type Book struct {
	Self    string // member ID
	Entries map[string]*Entry

	alarms map[string][]string // by the member whose export gave cause
}

// NewBook returns the Book of a cluster that is alone.
func NewBook(self Record) *Book {
	return &Book{Self: self.ID, Entries: map[string]*Entry{self.ID: {Record: self}}, alarms: map[string][]string{}}
}

// Own returns this cluster's own record.
func (b *Book) Own() *Record { return &b.Entries[b.Self].Record }

// Members returns the live members but this cluster, sorted by ID. A cluster that is not itself a member has none.
func (b *Book) Members() []*Entry {
	if b.Own().Standing != Joined {
		return nil
	}
	var out []*Entry
	for _, id := range slices.Sorted(maps.Keys(b.Entries)) {
		if e := b.Entries[id]; id != b.Self && e.Live() {
			out = append(out, e)
		}
	}
	return out
}

// Alarms returns what the exports of others gave cause for, sorted.
func (b *Book) Alarms() []string {
	var out []string
	for _, a := range b.alarms {
		out = append(out, a...)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// Exports returns the records that this cluster exports: its own, those that it sponsors, and every left record.
func (b *Book) Exports() []Record {
	var out []Record
	for _, id := range slices.Sorted(maps.Keys(b.Entries)) {
		e := b.Entries[id]
		switch {
		case id == b.Self, e.Record.Standing == Left, e.Record.Sponsor == b.Self && !e.Held:
			out = append(out, e.Record)
		}
	}
	return out
}

// Clash says why a record cannot be added: its name or trust domain belongs to another member ID. Nil if it can.
func (b *Book) Clash(r *Record) error {
	for _, id := range slices.Sorted(maps.Keys(b.Entries)) {
		o := &b.Entries[id].Record
		if id == r.ID || o.Standing == Left && id != b.Self {
			continue
		}
		if o.Name == r.Name {
			return fmt.Errorf("cluster name %q is already held by member %.8s (trust domain %s)", r.Name, o.ID, o.TrustDomain)
		}
		if o.TrustDomain == r.TrustDomain {
			return fmt.Errorf("trust domain %q is already held by cluster %q, member %.8s", r.TrustDomain, o.Name, o.ID)
		}
	}
	return nil
}

// Reader is how the exports of one member are to be believed.
type Reader struct {
	Introductions string // accept (default), ask or refuse
	// Verify reports whether the proof of a left record was made by the member itself or by its sponsor, as known here.
	Verify func(left, known *Record) bool
}

// Observe takes all records that one member exports now, and returns the IDs of the entries that changed, sorted. What an author may
// not say is refused and becomes an alarm that names it. A record that is no longer there removes nobody.
func (b *Book) Observe(author string, records []Record, rd Reader, now time.Time) []string {
	by, ok := b.Entries[author]
	if !ok || author == b.Self {
		return nil
	}
	name := by.Record.Name
	o := observation{b: b, author: author, name: name, rd: rd, now: now, changed: map[string]bool{}}
	for _, r := range records {
		o.record(r.clone())
	}
	if len(o.alarms) > 0 {
		b.alarms[author] = o.alarms
	} else {
		delete(b.alarms, author)
	}
	return slices.Sorted(maps.Keys(o.changed))
}

type observation struct {
	b            *Book
	author, name string
	rd           Reader
	now          time.Time
	changed      map[string]bool
	alarms       []string
}

func (o *observation) alarm(format string, args ...any) {
	o.alarms = append(o.alarms, fmt.Sprintf("cluster %s ", o.name)+fmt.Sprintf(format, args...))
}

func (o *observation) record(r Record) {
	cur := o.b.Entries[r.ID]
	switch {
	case r.Standing == Left:
		o.left(r, cur)
	case r.ID == o.b.Self:
		own := o.b.Own()
		if o.author != own.Sponsor {
			o.alarm("exports a record of this cluster, which only this cluster and its sponsor may: refused")
		} else if r.Name != own.Name || r.TrustDomain != own.TrustDomain {
			o.alarm("exports a record of this cluster under name %q and trust domain %q: refused", r.Name, r.TrustDomain)
		}
	case o.author == r.ID:
		o.own(r, cur)
	case o.author == r.Sponsor:
		o.introduced(r, cur)
	default:
		o.alarm("exports the record of %q (member %.8s), which only that member and its sponsor may: refused", r.Name, r.ID)
	}
}

// own takes a member's own record; cur is that of the author and therefore there.
func (o *observation) own(r Record, cur *Entry) {
	switch {
	case r.Name != cur.Record.Name || r.TrustDomain != cur.Record.TrustDomain:
		o.alarm("now calls itself %q with trust domain %q; names cannot change in a mesh: refused", r.Name, r.TrustDomain)
	case cur.Record.Standing == Left || r.Incarnation < cur.Record.Incarnation || r.Standing == Joining:
		// an older life of it, or one that is not finished
	default:
		if r.Incarnation == cur.Record.Incarnation {
			r.Sponsor = cur.Record.Sponsor
		}
		r.Admitted, r.Standing, r.Changed = cur.Record.Admitted, cur.Record.Standing, cur.Record.Changed
		if len(r.Bundle) == 0 {
			r.Bundle = cur.Record.Bundle
		}
		o.set(&Entry{Record: r, Direct: true, Via: cur.Via, Held: cur.Held, Proposed: cur.Proposed})
	}
}

func (o *observation) introduced(r Record, cur *Entry) {
	if r.Standing == Joining && r.Expires.Before(o.now) {
		return
	}
	r.Admitted = within(r.Admitted, o.now)
	if cur == nil || cur.Record.Standing == Left && r.Incarnation > cur.Record.Incarnation {
		if err := o.b.Clash(&r); err != nil {
			o.alarm("introduces %q (member %.8s), but %v: refused", r.Name, r.ID, err)
			return
		}
		if o.rd.Introductions == IntroductionsRefuse {
			o.alarm("introduces %q (trust domain %s), and its Peer object refuses introductions", r.Name, r.TrustDomain)
			return
		}
		o.set(&Entry{Record: r, Via: o.author, Held: o.rd.Introductions == IntroductionsAsk})
		return
	}
	have := cur.Record
	switch {
	case r.Incarnation < have.Incarnation || have.Standing == Left:
		// an older life of it: this is how a member that was away comes back with what it remembers
	case r.Name != have.Name || r.TrustDomain != have.TrustDomain:
		o.alarm("introduces member %.8s as %q with trust domain %q, known here as %q with %q: refused", r.ID, r.Name, r.TrustDomain, have.Name, have.TrustDomain)
	case have.Sponsor != o.author && cur.Direct:
		if r.Incarnation == have.Incarnation {
			o.alarm("claims to be the sponsor of cluster %s, which another member is: refused", have.Name)
		}
	case cur.Direct:
		// The member speaks for itself. Only a new life of it needs the sponsor's word.
		have.Incarnation, have.Standing, have.Changed = r.Incarnation, r.Standing, r.Changed
		o.set(&Entry{Record: have, Direct: true, Via: cur.Via, Held: cur.Held, Proposed: cur.Proposed})
	default:
		if have.Standing == Joined && r.Incarnation == have.Incarnation {
			r.Standing = Joined
		}
		r.Admitted, r.Bundle = have.Admitted, have.Bundle // first contact has been made
		o.set(&Entry{Record: r, Via: cur.Via, Held: cur.Held, Proposed: cur.Proposed})
	}
}

func (o *observation) left(r Record, cur *Entry) {
	if within(r.Changed, o.now).Add(TombstoneLife).Before(o.now) {
		return
	}
	switch {
	case r.ID == o.b.Self:
		if own := o.b.Own(); own.Standing != Left && r.Incarnation > own.Incarnation {
			o.alarm("says that this cluster has left the mesh; to come back, leave and join again with a new token")
		}
	case cur == nil, cur.Record.Standing == Left && r.Incarnation > cur.Record.Incarnation:
		o.set(&Entry{Record: buried(r, o.now), Via: o.author})
	case cur.Record.Standing == Left || r.Incarnation <= cur.Record.Incarnation:
		// it is known, or it has come back since
	case r.Name != cur.Record.Name || r.TrustDomain != cur.Record.TrustDomain:
		o.alarm("says that %q (trust domain %s) has left, but member %.8s is %q: refused", r.Name, r.TrustDomain, r.ID, cur.Record.Name)
	case o.author == r.ID, o.author == cur.Record.Sponsor, r.Proof != nil && o.rd.Verify != nil && o.rd.Verify(&r, &cur.Record):
		o.set(&Entry{Record: buried(r, o.now), Via: o.author})
	case cur.Proposed == nil || cur.Proposed.Incarnation < r.Incarnation:
		next := *cur
		p := buried(r, o.now)
		next.Proposed = &p
		o.set(&next)
	}
}

// buried is a left record as it is kept. A time that cannot be believed is replaced, and the proof with it, which covers the time.
func buried(r Record, now time.Time) Record {
	r.Bundle, r.Expires = nil, time.Time{}
	if t := within(r.Changed, now); !t.Equal(r.Changed) {
		r.Changed, r.Proof = t, nil
	}
	return r
}

func (o *observation) set(e *Entry) {
	if old := o.b.Entries[e.Record.ID]; old == nil || !sameEntry(old, e) {
		o.b.Entries[e.Record.ID] = e
		o.changed[e.Record.ID] = true
	}
}

func sameEntry(a, b *Entry) bool {
	return a.Direct == b.Direct && a.Via == b.Via && a.Held == b.Held && (a.Proposed == nil) == (b.Proposed == nil) &&
		(a.Proposed == nil || a.Proposed.Incarnation == b.Proposed.Incarnation) && string(a.Record.Bytes()) == string(b.Record.Bytes())
}

// within bounds a time that another clock made.
func within(t, now time.Time) time.Time {
	if t.IsZero() || t.After(now.Add(maxClockAhead)) {
		return Stamp(now)
	}
	return t
}

// Introduce takes what the issuer of a mesh token says about the mesh when this cluster joins it. A person vouches for it, so every live
// record is believed for first contact. It returns the IDs that changed, sorted; an error means that nothing was taken.
func (b *Book) Introduce(issuer string, records []Record, now time.Time) ([]string, error) {
	for i := range records {
		if r := &records[i]; r.Standing != Left && r.ID != b.Self {
			if err := b.Clash(r); err != nil {
				return nil, fmt.Errorf("member %.8s: %w", r.ID, err)
			}
		}
	}
	o := observation{b: b, author: issuer, now: now, changed: map[string]bool{}}
	for _, r := range records {
		cur := b.Entries[r.ID]
		switch {
		case r.ID == b.Self, cur != nil && cur.Record.Incarnation >= r.Incarnation && (cur.Record.Standing == Left || r.Standing != Left):
			continue
		case r.Standing == Left:
			r = buried(r, now)
		case r.Standing == Joining && r.Expires.Before(now):
			continue
		default:
			r.Admitted = within(r.Admitted, now)
		}
		o.set(&Entry{Record: r.clone(), Via: issuer})
	}
	return slices.Sorted(maps.Keys(o.changed)), nil
}

// Put replaces an entry by this cluster's own decision.
func (b *Book) Put(e *Entry) { b.Entries[e.Record.ID] = e }

// Forget removes a member without a trace, and its alarms.
func (b *Book) Forget(id string) {
	if id != b.Self {
		delete(b.Entries, id)
		delete(b.alarms, id)
	}
}

// Accept is a person's word: a held introduction becomes a member, a proposed leave takes effect. It reports whether there was any.
func (b *Book) Accept(id string) bool {
	e := b.Entries[id]
	switch {
	case e == nil:
		return false
	case e.Proposed != nil:
		b.Entries[id] = &Entry{Record: *e.Proposed, Via: e.Via}
	case e.Held:
		next := *e
		next.Held = false
		b.Entries[id] = &next
	default:
		return false
	}
	return true
}

// expired reports whether an entry's time is over.
func (b *Book) expired(id string, now time.Time) bool {
	r := &b.Entries[id].Record
	return id != b.Self && (r.Standing == Left && r.Changed.Add(TombstoneLife).Before(now) || r.Standing == Joining && r.Expires.Before(now))
}

// Due reports whether Expire would drop anything.
func (b *Book) Due(now time.Time) bool {
	for id := range b.Entries {
		if b.expired(id, now) {
			return true
		}
	}
	return false
}

// Expire drops left records after TombstoneLife and joining ones with their token, and returns their IDs, sorted.
func (b *Book) Expire(now time.Time) []string {
	var gone []string
	for _, id := range slices.Sorted(maps.Keys(b.Entries)) {
		if b.expired(id, now) {
			b.Forget(id)
			gone = append(gone, id)
		}
	}
	return gone
}

// Clone returns a Book that can be changed without changing b. Entries are shared: they are replaced, never changed.
func (b *Book) Clone() *Book {
	return &Book{Self: b.Self, Entries: maps.Clone(b.Entries), alarms: maps.Clone(b.alarms)}
}

// Name returns the name of a member, or the beginning of an ID that is not known.
func (b *Book) Name(id string) string {
	if e := b.Entries[id]; e != nil {
		return e.Record.Name
	}
	return id[:min(8, len(id))]
}
