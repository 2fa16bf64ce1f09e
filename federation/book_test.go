package federation_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
)

func id(c string) string { return strings.Repeat(c, 32/len(c)) }

func record(c, name string, incarnation uint64) federation.Record {
	return federation.Record{
		ID: id(c), Name: name, TrustDomain: name + ".demo", Addresses: []string{"127.0.0.1:7443"}, Gateways: []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:15443")},
		Bundle: []byte("{}"), Incarnation: incarnation, Standing: federation.Joined, Admitted: epoch, Changed: epoch,
	}
}

func sponsored(r federation.Record, by string) federation.Record {
	r.Sponsor = id(by)
	return r
}

func left(r federation.Record) federation.Record {
	r.Incarnation++
	r.Standing = federation.Left
	return r
}

// book is west's: it has admitted east, and east has admitted north.
func book(t *testing.T) *federation.Book {
	t.Helper()
	b := federation.NewBook(record("a", "west", 1))
	b.Put(&federation.Entry{Record: sponsored(record("b", "east", 3), "a"), Direct: true})
	b.Observe(id("b"), []federation.Record{sponsored(record("c", "north", 3), "b")}, federation.Reader{}, epoch)
	b.Observe(id("c"), []federation.Record{sponsored(record("c", "north", 3), "b")}, federation.Reader{}, epoch)
	if got := members(b); got != "east north" {
		t.Fatalf("members are %q", got)
	}
	return b
}

func members(b *federation.Book) string {
	var out []string
	for _, e := range b.Members() {
		out = append(out, e.Record.Name)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func TestBook(t *testing.T) {
	north := sponsored(record("c", "north", 3), "b")
	south := func(by string) federation.Record { return sponsored(record("d", "south", 3), by) }
	rename := func(r federation.Record, name string) federation.Record { r.Name = name; return r }
	retrust := func(r federation.Record, td string) federation.Record { r.TrustDomain = td; return r }
	for _, c := range []struct {
		name    string
		author  string
		records []federation.Record
		reader  federation.Reader
		members string
		alarm   string // part of one; "" wants none
		check   func(*testing.T, *federation.Book)
	}{
		{name: "absence removes nobody", author: "b", members: "east north"},
		{name: "a member leaves by its own word", author: "c", records: []federation.Record{left(north)}, members: "east"},
		{name: "a member leaves by its sponsor's word", author: "b", records: []federation.Record{left(north)}, members: "east"},
		{name: "anyone else only proposes", author: "c", records: []federation.Record{left(sponsored(record("b", "east", 3), "a"))}, members: "east north",
			check: func(t *testing.T, b *federation.Book) {
				if b.Entries[id("b")].Proposed == nil {
					t.Error("nothing is proposed")
				}
				if !b.Accept(id("b")) || members(b) != "north" {
					t.Errorf("after a person accepted: %q", members(b))
				}
			}},
		{name: "a proof is the member's own word, whoever carries it", author: "c", members: "north",
			records: []federation.Record{func() federation.Record {
				r := left(sponsored(record("b", "east", 3), "a"))
				r.Proof = &federation.Proof{}
				return r
			}()},
			reader: federation.Reader{Verify: func(_, _ *federation.Record) bool { return true }}},
		{name: "an old left record does not beat a new life", author: "b", members: "east north",
			records: []federation.Record{func() federation.Record { r := left(north); r.Incarnation = 2; return r }()}},
		{name: "a live record by neither member nor sponsor is refused", author: "c", records: []federation.Record{sponsored(record("b", "east", 9), "a")},
			members: "east north", alarm: `cluster north exports the record of "east"`},
		{name: "nobody else exports this cluster", author: "b", records: []federation.Record{record("a", "west", 9)}, members: "east north", alarm: "cluster east exports a record of this cluster"},
		{name: "an introduction", author: "b", records: []federation.Record{south("b")}, members: "east north south"},
		{name: "an introduction that a person must accept", author: "b", records: []federation.Record{south("b")}, reader: federation.Reader{Introductions: federation.IntroductionsAsk}, members: "east north",
			check: func(t *testing.T, b *federation.Book) {
				if !b.Accept(id("d")) || members(b) != "east north south" {
					t.Errorf("after a person accepted: %q", members(b))
				}
			}},
		{name: "a refused introduction", author: "b", records: []federation.Record{south("b")}, reader: federation.Reader{Introductions: federation.IntroductionsRefuse}, members: "east north", alarm: "refuses introductions"},
		{name: "a name is held once", author: "b", records: []federation.Record{rename(south("b"), "north")}, members: "east north", alarm: `cluster name "north" is already held`},
		{name: "a trust domain is held once", author: "b", records: []federation.Record{retrust(south("b"), "west.demo")}, members: "east north", alarm: `trust domain "west.demo" is already held`},
		{name: "a member cannot rename itself", author: "c", records: []federation.Record{rename(north, "nord")}, members: "east north", alarm: "names cannot change"},
		{name: "nor be renamed by its sponsor", author: "b", records: []federation.Record{rename(north, "nord")}, members: "east north", alarm: "known here as"},
		{name: "a sponsor cannot be replaced", author: "c", records: []federation.Record{sponsored(record("b", "east", 3), "c")}, members: "east north", alarm: "claims to be the sponsor"},
		{name: "the sponsor does not change a bundle after first contact", author: "b", members: "east north",
			records: []federation.Record{func() federation.Record { r := north; r.Bundle = []byte("evil"); r.Incarnation = 9; return r }()},
			check: func(t *testing.T, b *federation.Book) {
				if got := string(b.Entries[id("c")].Record.Bundle); got != "{}" {
					t.Errorf("bundle is %q", got)
				}
			}},
		{name: "the member itself changes its bundle", author: "c", members: "east north",
			records: []federation.Record{func() federation.Record { r := north; r.Bundle = []byte("new"); return r }()},
			check: func(t *testing.T, b *federation.Book) {
				if got := string(b.Entries[id("c")].Record.Bundle); got != "new" {
					t.Errorf("bundle is %q", got)
				}
			}},
		{name: "a joining cluster carries nothing", author: "b", members: "east north",
			records: []federation.Record{func() federation.Record {
				r := south("b")
				r.Standing, r.Expires = federation.Joining, epoch.Add(time.Hour)
				return r
			}()}},
		{name: "this cluster is told that it has left", author: "b", records: []federation.Record{left(record("a", "west", 1))}, members: "east north", alarm: "says that this cluster has left"},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := book(t)
			b.Observe(id(c.author), c.records, c.reader, epoch)
			if got := members(b); got != c.members {
				t.Errorf("members are %q, want %q", got, c.members)
			}
			alarms := strings.Join(b.Alarms(), "\n")
			if (alarms == "") != (c.alarm == "") || !strings.Contains(alarms, c.alarm) {
				t.Errorf("alarms are %q, want %q", alarms, c.alarm)
			}
			b.Observe(id(c.author), nil, c.reader, epoch)
			if len(b.Alarms()) > 0 {
				t.Errorf("alarms stay without their cause: %q", b.Alarms())
			}
			if c.check != nil {
				c.check(t, b)
			}
		})
	}
}

// TestALeaverStaysOut: an absent member comes back and still exports the leaver's live record.
func TestALeaverStaysOut(t *testing.T) {
	b := book(t)
	north := sponsored(record("c", "north", 3), "b")
	b.Observe(id("c"), []federation.Record{left(north)}, federation.Reader{}, epoch)
	b.Observe(id("b"), []federation.Record{north}, federation.Reader{}, epoch.Add(time.Hour))
	if got := members(b); got != "east" {
		t.Fatalf("members are %q", got)
	}
	if !slices.ContainsFunc(b.Exports(), func(r federation.Record) bool { return r.ID == id("c") && r.Standing == federation.Left }) {
		t.Fatal("the left record is not exported")
	}
	// A new member learns of the left record, and then meets the absent one.
	n := federation.NewBook(record("e", "center", 1))
	if _, err := n.Introduce(id("a"), b.Exports(), epoch); err != nil {
		t.Fatal(err)
	}
	n.Put(&federation.Entry{Record: sponsored(record("b", "east", 3), "a"), Direct: true})
	n.Observe(id("b"), []federation.Record{north}, federation.Reader{}, epoch)
	if got := members(n); strings.Contains(got, "north") {
		t.Fatalf("members of the new one are %q", got)
	}
	// With a new token it is back, at a later incarnation.
	again := north
	again.Incarnation = 6
	b.Observe(id("b"), []federation.Record{again}, federation.Reader{}, epoch.Add(2*time.Hour))
	if got := members(b); got != "east north" {
		t.Fatalf("members are %q after it came back", got)
	}
}

func TestTombstonesExpire(t *testing.T) {
	b := book(t)
	gone := left(sponsored(record("c", "north", 3), "b"))
	b.Observe(id("c"), []federation.Record{gone}, federation.Reader{}, epoch)
	if got := b.Expire(epoch.Add(federation.TombstoneLife - time.Second)); len(got) != 0 {
		t.Fatalf("%v expired early", got)
	}
	later := epoch.Add(federation.TombstoneLife + time.Second)
	if got := b.Expire(later); len(got) != 1 {
		t.Fatalf("%v expired, want north", got)
	}
	b.Observe(id("b"), []federation.Record{gone}, federation.Reader{}, later)
	if b.Entries[id("c")] != nil {
		t.Fatal("an expired left record came back")
	}
}

func TestJudge(t *testing.T) {
	const (
		fresh, suspect, withdrawn = discovery.Fresh, discovery.Suspect, discovery.Withdrawn
	)
	type event struct {
		at    int // seconds
		what  string
		state discovery.PeerState
	}
	p := federation.DefaultPatience()
	for name, events := range map[string][]event{
		"silence makes suspect, never withdrawn while the data path answers": {{0, "answer", fresh}, {19, "", fresh}, {20, "probe ok", suspect}, {600, "probe ok", suspect}},
		"ten seconds of answers make fresh":                                  {{0, "answer", fresh}, {30, "", suspect}, {31, "answer", suspect}, {36, "answer", suspect}, {41, "answer", fresh}},
		"a gap begins anew":                                                  {{0, "answer", fresh}, {30, "", suspect}, {31, "answer", suspect}, {42, "answer", suspect}, {47, "answer", suspect}, {52, "answer", fresh}},
		"silent and dead is withdrawn, one success brings it back":           {{0, "answer", fresh}, {5, "probe failed", fresh}, {10, "probe failed", fresh}, {15, "probe failed", fresh}, {20, "", withdrawn}, {25, "probe ok", suspect}},
		"a dead data path alone is not withdrawn":                            {{0, "answer", fresh}, {5, "probe failed", fresh}, {10, "probe failed", fresh}, {15, "probe failed", fresh}, {16, "answer", fresh}, {30, "probe failed", fresh}},
		"a success in load reports counts":                                   {{0, "answer", fresh}, {5, "probe failed", fresh}, {10, "probe failed", fresh}, {15, "probe failed", fresh}, {16, "report", fresh}, {17, "probe failed", fresh}, {18, "probe failed", fresh}, {19, "probe failed", fresh}, {20, "", suspect}, {31, "", withdrawn}},
		"an announced restart is excused":                                    {{0, "answer", fresh}, {0, "restart", fresh}, {59, "", fresh}, {60, "", suspect}},
	} {
		t.Run(name, func(t *testing.T) {
			o, state := federation.Observed{Answer: epoch, Success: epoch}, fresh
			for _, e := range events {
				now := epoch.Add(time.Duration(e.at) * time.Second)
				switch e.what {
				case "answer":
					o = p.Heard(o, now)
				case "restart":
					o.Grace = now.Add(p.Grace)
				case "probe ok":
					o = o.Probed(true, now)
				case "probe failed":
					o = o.Probed(false, now)
				case "report":
					o = o.Succeeded(now)
				}
				if state = p.Judge(state, o, now); state != e.state {
					t.Fatalf("at %d s, after %q: %s, want %s", e.at, e.what, state, e.state)
				}
			}
		})
	}
}
