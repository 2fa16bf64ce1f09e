package peering_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/federation"
	"github.com/hanse-mesh/hanse/federation/etcd"
	"github.com/hanse-mesh/hanse/federation/join"
	"github.com/hanse-mesh/hanse/federation/peering"
	"github.com/hanse-mesh/hanse/identity"
)

var payments = discovery.Name{Namespace: "shop", Name: "payments"}

func silent(peering.Progress) {}

// settle lets d of the bubble's time pass.
func settle(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// TestJoinKilledAnywhere kills one side after each of its writes during a join, restarts it, and repeats the join with the same token.
func TestJoinKilledAnywhere(t *testing.T) {
	for _, victim := range []string{"east", "west"} {
		for n := int64(0); ; n++ {
			whole := false
			t.Run(fmt.Sprintf("%s after %d writes", victim, n), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					w := newWorld(t)
					defer w.stop()
					west, east := w.add("west"), w.add("east")
					west.export(payments, 3)
					east.export(payments, 2)
					settle(time.Second)
					token, _, err := west.mesh.Load().CreateToken(t.Context(), "east", 0)
					if err != nil {
						t.Fatal(err)
					}
					v := w.clusters[victim]
					v.fault.killAfter(n)
					ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
					_, err = east.mesh.Load().Join(ctx, token, silent)
					cancel()
					settle(2 * time.Second)
					v.stop()
					whole = !v.fault.revive()
					v.start()
					v.healLinks()
					settle(time.Second)
					for _, c := range []*cluster{west, east} {
						s := c.mesh.Load().Status()
						if imp := c.mesh.Load().Clusterset().Imports.Get(payments); s.Self.Standing == federation.Joining && len(imp.From) != 1 {
							t.Errorf("%s is joining and imports %+v", c.name, imp)
						}
					}
					if whole && err != nil {
						t.Fatalf("nobody was killed, and the join failed: %v", err)
					}
					if _, err := east.mesh.Load().Join(t.Context(), token, silent); err != nil {
						t.Fatalf("the repeated join: %v", err)
					}
					settle(30 * time.Second)
					for _, c := range []*cluster{west, east} {
						var got struct {
							Self    string
							Members map[string]string
							Imports map[string]map[string]int
						}
						if err := json.Unmarshal(c.state(), &got); err != nil {
							t.Fatal(err)
						}
						if got.Self != "member" || len(got.Members) != 1 || got.Imports["shop/payments"]["west"] != 3 || got.Imports["shop/payments"]["east"] != 2 {
							t.Errorf("%s after the repeated join: %s", c.name, c.state())
						}
					}
				})
			})
			if whole || t.Failed() {
				t.Logf("a join of %s is %d writes", victim, n)
				break
			}
		}
	}
}

// TestJoiningExpires: a join that is never finished leaves nothing once its token has expired.
func TestJoiningExpires(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		west, east := w.add("west"), w.add("east")
		token, _, err := west.mesh.Load().CreateToken(t.Context(), "east", 0)
		if err != nil {
			t.Fatal(err)
		}
		west.fault.killAfter(2) // binding, joining record; not the member
		east.mesh.Load().Join(t.Context(), token, silent)
		west.stop()
		west.fault.revive()
		west.start()
		settle(time.Second)
		if s := west.mesh.Load().Status(); len(s.Members) != 1 || s.Members[0].State != "joining" {
			t.Fatalf("west shows %+v", s.Members)
		}
		if s := east.mesh.Load().Status(); s.Self.Standing != federation.Joining {
			t.Fatalf("east is %s", s.Self.Standing)
		}
		settle(15 * time.Minute)
		if s := west.mesh.Load().Status(); len(s.Members) != 0 {
			t.Errorf("west still shows %+v", s.Members)
		}
		if s := east.mesh.Load().Status(); s.Self.Standing != federation.Joined || s.Self.Sponsor != "" {
			t.Errorf("east is %s, sponsor %q", s.Self.Standing, s.Self.Sponsor)
		}
		if _, err := east.mesh.Load().Join(t.Context(), token, silent); !errors.Is(err, join.ErrExpired) {
			t.Errorf("the old token: %v, want expired", err)
		}
		if err := w.join("east", "west"); err != nil {
			t.Errorf("a new token: %v", err)
		}
	})
}

// TestTokens: each way in which a token can be wrong is told.
func TestTokens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		west, east, north := w.add("west"), w.add("east"), w.add("north")
		ctx := t.Context()
		tokenFor := func(c *cluster, name string) string {
			token, _, err := c.mesh.Load().CreateToken(ctx, name, 0)
			if err != nil {
				t.Fatal(err)
			}
			return token
		}
		fails := func(what string, c *cluster, token string, want error, text string) {
			t.Helper()
			before := c.own.Dump("mesh/")
			_, err := c.mesh.Load().Join(ctx, token, silent)
			if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v, want %v with %q", what, err, want, text)
			}
			if diff := cmp.Diff(before, c.own.Dump("mesh/")); diff != "" {
				t.Errorf("%s changed something: %s", what, diff)
			}
		}
		token := tokenFor(west, "east")
		tampered := token[:20] + "A" + token[21:]
		if tampered == token {
			tampered = token[:20] + "B" + token[21:]
		}
		fails("tampered", east, tampered, join.ErrTampered, "checksum")
		fails("cut", east, token[:len(token)-7], join.ErrTampered, "")
		fails("not a token", east, "hunter2", join.ErrTampered, "hns1_")
		forged, err := join.DecodeToken(token)
		if err != nil {
			t.Fatal(err)
		}
		forged.Secret[0] ^= 1
		fails("wrong secret", east, forged.Encode(), join.ErrWrong, "")
		forged.Secret[0] ^= 1
		forged.ID[0] ^= 1
		fails("wrong ID", east, forged.Encode(), join.ErrWrong, "")
		forged.ID[0] ^= 1
		forged.Pins[0][0] ^= 1
		fails("another issuer", east, forged.Encode(), nil, "none of the roots")
		fails("another cluster's", north, token, nil, `for a cluster named "east", not "north"`)
		fails("its own", west, token, nil, "made by this cluster")

		anyone := tokenFor(west, "")
		if _, err := east.mesh.Load().Join(ctx, anyone, silent); err != nil {
			t.Fatal(err)
		}
		settle(5 * time.Second)
		fails("used", north, anyone, join.ErrUsed, "")
		if res, err := east.mesh.Load().Join(ctx, anyone, silent); err != nil || res.Through != "west" {
			t.Errorf("the same joiner again: %+v, %v", res, err)
		}
		late := tokenFor(west, "north")
		settle(16 * time.Minute)
		w.partition("north", "west", true)
		fails("expired by this clock, nobody to ask", north, late, join.ErrExpired, "cannot be asked")
		w.partition("north", "west", false)
		north.skew = -10 * time.Minute
		north.stop()
		north.start()
		fails("expired by the issuer's clock, none open", north, late, join.ErrExpired, "no open mesh token")
		tokenFor(west, "south")
		fails("expired by the issuer's clock", north, late, join.ErrExpired, "")
		for k, v := range west.own.Dump("mesh/") {
			if strings.Contains(v, string(forged.Secret[:])) {
				t.Errorf("%s holds a token's secret", k)
			}
		}
	})
}

// TestTokenClockSkew: while two clusters' clocks are more than 30 s apart, a join is refused for that reason, and not because the token had
// expired; neither side changes, and the same token serves once the clocks are right. Only the issuer's clock says when its life is over.
func TestTokenClockSkew(t *testing.T) {
	const ten = 10 * time.Minute
	for _, c := range []struct {
		name         string
		issuer, join time.Duration
	}{
		{"issuer ahead", ten, 0}, {"issuer behind", -ten, 0}, {"joiner ahead", 0, ten}, {"joiner behind", 0, -ten},
		{"issuer ahead, joiner behind", ten, -ten}, {"issuer behind, joiner ahead", -ten, ten},
		{"both ahead", ten, ten}, {"both behind", -ten, -ten}, {"29 s apart", -ten, 29*time.Second - ten},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				west, east := w.make("west", 1), w.make("east", 2)
				west.skew, east.skew = c.issuer, c.join
				for _, c := range []*cluster{west, east} {
					c.start()
				}
				settle(time.Second)
				token, _, err := west.mesh.Load().CreateToken(t.Context(), "east", 0)
				if err != nil {
					t.Fatal(err)
				}
				settle(14 * time.Minute)
				if apart := (c.issuer - c.join).Abs(); apart > 30*time.Second {
					before := [2]map[string]string{west.own.Dump(""), east.own.Dump("")}
					var failed *join.CheckError
					_, err := east.mesh.Load().Join(t.Context(), token, silent)
					if !errors.As(err, &failed) || len(failed.Failed) != 1 || !strings.Contains(err.Error(), fmt.Sprintf("clocks agree: %.1fs apart", apart.Seconds())) {
						t.Errorf("a join with clocks %v apart: %v", apart, err)
					}
					if diff := cmp.Diff(before, [2]map[string]string{west.own.Dump(""), east.own.Dump("")}); diff != "" {
						t.Errorf("it changed something: %s", diff)
					}
					east.skew = west.skew
					east.stop()
					east.start()
				}
				if _, err := east.mesh.Load().Join(t.Context(), token, silent); err != nil {
					t.Errorf("a join with clocks that agree: %v", err)
				}
				for name, skew := range map[string]time.Duration{"north": west.skew, "south": west.skew - ten} { // their clocks save no old token
					late, _, err := west.mesh.Load().CreateToken(t.Context(), name, 0)
					if err != nil {
						t.Fatal(err)
					}
					settle(15*time.Minute + time.Second)
					c := w.make(name, byte(len(w.clusters)+1))
					c.skew = skew
					c.start()
					if _, err := c.mesh.Load().Join(t.Context(), late, silent); !errors.Is(err, join.ErrExpired) {
						t.Errorf("%s with an old token: %v", name, err)
					}
				}
			})
		})
	}
}

// TestPreview: each check fails for its reason, with a remedy, and nothing is changed on either side.
func TestPreview(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(w *world, east *cluster)
		want  string // part of the failed check's name; "" is all well
	}{
		"all well":    {func(*world, *cluster) {}, ""},
		"name":        {func(w *world, east *cluster) { east.self.Cluster = "west" }, "names free"},
		"clock":       {func(w *world, east *cluster) { east.skew = 2 * time.Minute }, "clocks agree"},
		"version":     {func(w *world, east *cluster) { east.version = "v0.7.0" }, "versions agree"},
		"unreachable": {func(w *world, east *cluster) { east.advertise = "nowhere.test:7443" }, "west → nowhere.test:7443"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				west, east := w.add("west"), w.make("east", 2)
				c.spoil(w, east)
				east.start()
				settle(time.Second)
				token, _, err := west.mesh.Load().CreateToken(t.Context(), "", 0)
				if err != nil {
					t.Fatal(err)
				}
				before := [2]map[string]string{west.own.Dump(""), east.own.Dump("")}
				var checks, failed []string
				p, err := east.mesh.Load().Preview(t.Context(), token, func(p peering.Progress) {
					if p.Check != nil {
						checks = append(checks, fmt.Sprintf("%t %s: %s", p.Check.OK, p.Check.Name, p.Check.Detail))
						if !p.Check.OK {
							failed = append(failed, p.Check.Name)
							if p.Check.Remedy == "" {
								t.Errorf("%s has no remedy", p.Check.Name)
							}
						}
					}
				})
				t.Log(strings.Join(checks, "\n"))
				var ce *join.CheckError
				if (err != nil) != (c.want != "") || err != nil && !errors.As(err, &ce) {
					t.Fatalf("preview: %v", err)
				}
				if p.Mesh != "demo" || p.Issuer.Name != "west" || len(checks) != 6 {
					t.Errorf("preview is %+v with %d checks", p, len(checks))
				}
				if got := strings.Join(failed, ","); got != c.want {
					t.Errorf("failed checks are %q, want %q", got, c.want)
				}
				if diff := cmp.Diff(before, [2]map[string]string{west.own.Dump(""), east.own.Dump("")}); diff != "" {
					t.Errorf("a preview changed something: %s", diff)
				}
				if c.want != "" {
					if _, err := east.mesh.Load().Join(t.Context(), token, silent); err == nil {
						t.Error("a join went through in spite of it")
					}
				}
			})
		})
	}
}

// TestManyJoinsAndLeaves leaves no goroutine, memory or key behind.
func TestManyJoinsAndLeaves(t *testing.T) {
	cycles := 60
	if os.Getenv("HANSE_SOAK") != "" { // make soak
		cycles = 1000
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		west, east := w.add("west"), w.add("east")
		west.export(payments, 2)
		east.export(payments, 2)
		cycle := func() {
			if err := w.join("east", "west"); err != nil {
				t.Fatal(err)
			}
			if cs := west.mesh.Load().Clusterset(); cs.Members["east"] == nil {
				t.Fatal("west does not see east")
			}
			if _, err := east.mesh.Load().Leave(t.Context(), "", false); err != nil {
				t.Fatal(err)
			}
			settle(5 * time.Second)
			if cs := west.mesh.Load().Clusterset(); len(cs.Members) != 0 || len(cs.Imports.Get(payments).From) != 1 {
				t.Fatalf("west still imports %+v", cs.Imports.Get(payments))
			}
		}
		restart := func(skew time.Duration) {
			west.stop()
			west.skew = skew
			west.start()
			west.healLinks()
			settle(10 * time.Second)
		}
		counts := func() map[string]int {
			restart(25 * time.Hour) // tokens are kept for a day, to tell expired from wrong
			runtime.GC()
			got := map[string]int{
				"goroutines": runtime.NumGoroutine(),
				"own keys":   len(west.own.Dump("")) + len(east.own.Dump("")), "imported keys": len(west.imports.Dump("")) + len(east.imports.Dump("")),
			}
			restart(0)
			return got
		}
		for range 3 {
			cycle()
		}
		keys := west.serviceKeys()
		before := counts()
		for range cycles {
			cycle()
		}
		if diff := cmp.Diff(before, counts()); diff != "" {
			t.Errorf("after %d cycles:\n%s", cycles, diff)
		}
		if !maps.Equal(keys, west.serviceKeys()) {
			t.Error("the remaining member's exports are not byte-identical")
		}
	})
}

// TestRestartWithPeersAbsent: everything restarts, nobody answers, and each Clusterset is as it was.
func TestRestartWithPeersAbsent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		names := []string{"west", "east", "north"}
		for i, n := range names {
			w.add(n).export(payments, 100+i)
		}
		for _, n := range names[1:] {
			if err := w.join(n, "west"); err != nil {
				t.Fatal(err)
			}
		}
		settle(time.Minute)
		for i, a := range names {
			for _, b := range names[i+1:] {
				w.partition(a, b, true)
			}
		}
		for _, silence := range []time.Duration{0, 2 * time.Minute} { // fresh, then suspect
			settle(silence)
			for _, n := range names {
				c := w.clusters[n]
				before := dump(t, c.mesh.Load().Clusterset())
				c.stop()
				c.start()
				if diff := cmp.Diff(before, dump(t, c.mesh.Load().Clusterset())); diff != "" {
					t.Errorf("%s after its restart, %s after the others fell silent:\n%s", n, silence, diff)
				}
			}
		}
		settle(30 * time.Second)
		for _, n := range names {
			cs := w.clusters[n].mesh.Load().Clusterset()
			for name, m := range cs.Members {
				if m.State != discovery.Suspect {
					t.Errorf("%s is %s at %s", name, m.State, n)
				}
			}
			if got := len(cs.Imports.Get(payments).From); got != 3 {
				t.Errorf("%s imports from %d clusters", n, got)
			}
		}
	})
}

// dump is a whole Clusterset as text, but for its own counters.
func dump(t *testing.T, c *discovery.Clusterset) string {
	t.Helper()
	members := map[string]discovery.Member{}
	for n, m := range c.Members {
		x := *m
		x.Since = time.Time{}
		members[n] = x
	}
	imports := map[string]*discovery.Import{}
	for n, i := range c.Imports.All() {
		x := *i
		x.From = slices.Clone(i.From)
		for n := range x.From {
			x.From[n].Revision = 0 // after a restart it is that of the checkpoint, which is not older
		}
		imports[n.String()] = &x
	}
	b, err := json.MarshalIndent(map[string]any{"members": members, "imports": imports, "trusted": c.Trusted}, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestBundlesFollowTheMembersOwnExport: a new root reaches the peers before it signs, and they say so.
func TestBundlesFollowTheMembersOwnExport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		west, east := w.add("west"), w.add("east")
		if err := w.join("east", "west"); err != nil {
			t.Fatal(err)
		}
		settle(5 * time.Second)
		td := spiffeid.RequireTrustDomainFromString("west.demo")
		next := west.ca.bundle()
		prepared := newAuthority(t, td)
		next.AddX509Authority(prepared.root)
		next.SetSequenceNumber(2)
		west.bundles.Update(td, next)
		settle(2 * time.Second)
		got := east.source.Bundles()[td]
		if n, _ := got.SequenceNumber(); n != 2 || len(got.X509Authorities()) != 2 {
			t.Fatalf("east has sequence %d with %d roots", n, len(got.X509Authorities()))
		}
		if got := west.mesh.Load().Acked(td); got["east"] != 0 {
			t.Fatalf("acked before anyone said so: %v", got)
		}
		east.mesh.Load().SetAcked(map[spiffeid.TrustDomain]uint64{td: 2})
		settle(2 * time.Second)
		if got := west.mesh.Load().Acked(td); got["east"] != 2 {
			t.Fatalf("acked: %v", got)
		}
		west.ca = prepared // and now it signs
		west.source.SetSVID(prepared.svid(identity.ControlPlaneID(td)))
		settle(time.Minute)
		if cs := east.mesh.Load().Clusterset(); cs.Members["west"].State != discovery.Fresh {
			t.Fatalf("west is %s at east", cs.Members["west"].State)
		}
	})
}

// TestAPersonsDistrustIsObeyed: a trust domain that was removed by hand is not added again.
func TestAPersonsDistrustIsObeyed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		w.add("west")
		east := w.add("east")
		if err := w.join("east", "west"); err != nil {
			t.Fatal(err)
		}
		settle(5 * time.Second)
		td := spiffeid.RequireTrustDomainFromString("west.demo")
		east.bundles.Remove(td)
		settle(time.Minute)
		east.stop()
		east.start()
		settle(time.Minute)
		if _, err := east.source.GetX509BundleForTrustDomain(td); err == nil {
			t.Fatal("it is trusted again")
		}
	})
}

// TestAHostileMemberIsRefusedAndNamed: a member writes into its own exports what it may not say.
func TestAHostileMemberIsRefusedAndNamed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		west, east, north := w.add("west"), w.add("east"), w.add("north")
		west.export(payments, 3)
		north.export(payments, 2)
		settle(time.Minute) // west's export is older than the admission of the others
		for _, n := range []string{"east", "north"} {
			if err := w.join(n, "west"); err != nil {
				t.Fatal(err)
			}
		}
		settle(10 * time.Second)
		idOf := func(c *cluster) string { return c.mesh.Load().Status().Self.ID }
		put := func(key string, value []byte) {
			t.Helper()
			if _, _, err := east.own.Txn(t.Context(), nil, []etcd.Op{{Key: "exports/v1/" + key, Value: value}}); err != nil {
				t.Fatal(err)
			}
		}
		stolen := north.mesh.Load().Status().Self // with east's root, and a new life
		stolen.Incarnation += 10
		stolen.Bundle = east.mesh.Load().Status().Self.Bundle
		put("members/"+idOf(north), stolen.Bytes())
		double := stolen
		double.ID, double.Sponsor = strings.Repeat("d", 32), idOf(east)
		put("members/"+double.ID, double.Bytes())
		put("members/"+strings.Repeat("e", 32), []byte("not a record"))
		forged := north.local.Services.Get(payments).Endpoints[0] // an ID of another trust domain, under a service of its own
		svc := &discovery.Service{Name: payments, Ports: []discovery.Port{{Name: "http", Number: 80, Protocol: discovery.HTTP}}, Export: &discovery.Export{Created: time.UnixMilli(1)}, Endpoints: []*discovery.Endpoint{forged}}
		ex, faults := federation.Encode(&discovery.Snapshot{Self: north.self, Services: discovery.NewByName(map[discovery.Name]*discovery.Service{payments: svc})}, nil, time.Now())
		if len(faults) > 0 {
			t.Fatal(faults)
		}
		for k := range ex.Sums(federation.AllScope) {
			v, err := ex.Value(federation.AllScope, k)
			if err != nil {
				t.Fatal(err)
			}
			put("all/"+k, v)
		}
		settle(10 * time.Second)

		s := west.mesh.Load().Status()
		alarms := w.anonymous(strings.Join(s.Alarms, "\n"))
		for _, want := range []string{
			`cluster east exports the record of "north" (member <north>), which only that member and its sponsor may: refused`,
			`cluster east introduces "north" (member dddddddd), but cluster name "north" is already held`,
		} {
			if !strings.Contains(alarms, want) {
				t.Errorf("alarms are\n%s\nwithout %s", alarms, want)
			}
		}
		var refused []string
		for _, m := range s.Members {
			for _, f := range m.Faults {
				refused = append(refused, f.Error())
			}
		}
		for _, want := range []string{"from cluster east: 1 of 1 endpoints refused", "not of the exporter's trust domain east.demo", "from cluster east: not a Member"} {
			if !strings.Contains(strings.Join(refused, "\n"), want) {
				t.Errorf("faults are %q, without %q", refused, want)
			}
		}
		cs := west.mesh.Load().Clusterset()
		for _, f := range cs.Imports.Get(payments).From {
			if f.Member == "east" && len(f.Endpoints) > 0 {
				t.Errorf("endpoints came in from east: %+v", f.Endpoints[0])
			}
		}
		if cs.Imports.Get(payments).From[0].Member == "east" {
			t.Error("an export time before its admission made east the oldest")
		}
		if got := west.source.Bundles()[spiffeid.RequireTrustDomainFromString("north.demo")]; !got.X509Authorities()[0].Equal(north.ca.root) {
			t.Error("north's root was replaced")
		}
	})
}

// TestFlatNetwork: on one network the endpoints themselves are probed, with their own IDs.
func TestFlatNetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		defer w.stop()
		west, east := w.make("west", 1), w.make("east", 2)
		for _, c := range []*cluster{west, east} {
			c.self.Network = "flat"
			c.local.Self = c.self
			c.start()
		}
		west.export(payments, 5)
		if err := w.join("east", "west"); err != nil {
			t.Fatal(err)
		}
		settle(10 * time.Second)
		probe := func() peering.ProbeResult { return east.mesh.Load().Status().Members[0].Probe }
		if p := probe(); !p.Known || p.OK || !strings.Contains(p.Error, "10.0.0.") {
			t.Fatalf("nobody listens, and the probe says %+v", p)
		}
		for _, ep := range west.local.Services.Get(payments).Endpoints {
			address := ep.DialAddress("http").String()
			w.answer(w.network.listen(address, "west"), west, spiffeid.RequireFromString(ep.SPIFFEID))
		}
		settle(10 * time.Second)
		if p := probe(); !p.OK {
			t.Fatalf("probe says %+v", p)
		}
	})
}

// TestLeaveKilledAnywhere kills the leaver after each of its writes, restarts it, and repeats the leave.
func TestLeaveKilledAnywhere(t *testing.T) {
	for n, whole := int64(0), false; !whole && !t.Failed(); n++ {
		t.Run(fmt.Sprintf("after %d writes", n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				west, east := w.add("west"), w.add("east")
				west.export(payments, 3)
				if err := w.join("east", "west"); err != nil {
					t.Fatal(err)
				}
				settle(5 * time.Second)
				keys := west.serviceKeys()
				east.fault.killAfter(n)
				ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
				_, err := east.mesh.Load().Leave(ctx, "", false)
				cancel()
				settle(2 * time.Second)
				east.stop()
				whole = !east.fault.revive()
				east.start()
				east.healLinks()
				settle(time.Second)
				if whole && err != nil {
					t.Fatalf("nobody was killed, and the leave failed: %v", err)
				}
				if _, err := east.mesh.Load().Leave(t.Context(), "", false); err != nil {
					t.Fatalf("the repeated leave: %v", err)
				}
				settle(10 * time.Second)
				for _, c := range []*cluster{west, east} {
					cs, trusted := c.mesh.Load().Clusterset(), c.source.Bundles()
					if len(cs.Members) != 0 || len(trusted) != 1 || len(c.imports.Dump("")) != 0 {
						t.Errorf("%s has members %v, %d trust domains, imports %v", c.name, cs.Members, len(trusted), c.imports.Dump(""))
					}
				}
				if !maps.Equal(keys, west.serviceKeys()) {
					t.Error("west's exports are not byte-identical")
				}
				if err := w.join("east", "west"); err != nil {
					t.Errorf("join again: %v", err)
				}
			})
		})
	}
}

// TestAMoveBetweenScopesIsSeamless: whoever may read a service before and after its audience changes never misses an endpoint.
func TestAMoveBetweenScopesIsSeamless(t *testing.T) {
	for name, move := range map[string][2][]string{
		"wider":              {{"east"}, {"east", "north"}},
		"narrower":           {{"east", "north"}, {"east"}},
		"from all":           {nil, {"east"}},
		"to all":             {{"east"}, nil},
		"by label":           {{"east"}, {"tier=gold"}},
		"label to all":       {{"tier=gold"}, nil},
		"member and a label": {{"tier=gold"}, {"east", "tier=tin"}},
		"over a restart":     {{"east"}, {"tier=gold"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				defer w.stop()
				west, east, north := w.add("west"), w.add("east"), w.add("north")
				west.peer("east", []string{"labels=tier=gold"})
				west.export(payments, 60, move[0]...)
				for _, n := range []string{"east", "north"} {
					if err := w.join(n, "west"); err != nil {
						t.Fatal(err)
					}
				}
				settle(10 * time.Second)
				if n := endpoints(east.mesh.Load().Clusterset(), "west"); n != 60 {
					t.Fatalf("east has %d endpoints before the move", n)
				}
				ctx, cancel := context.WithCancel(t.Context())
				var watching sync.WaitGroup
				watching.Go(func() {
					m := east.mesh.Load()
					for ctx.Err() == nil {
						updated := m.Updated()
						if n := endpoints(m.Clusterset(), "west"); n != 60 {
							t.Errorf("east has %d endpoints", n)
							return
						}
						select {
						case <-updated:
						case <-ctx.Done():
						}
					}
				})
				if name == "over a restart" {
					west.stop()
				}
				west.export(payments, 60, move[1]...)
				if west.stop == nil {
					west.start()
					west.healLinks()
				}
				settle(29 * time.Second)
				old := federation.AudienceScope(move[0])
				if old != federation.AudienceScope(move[1]) && len(west.own.Dump("exports/v1/"+old+"/svc/")) == 0 {
					t.Error("the old scope is empty before 30 s have passed")
				}
				settle(time.Minute)
				if n := len(west.own.Dump("exports/v1/" + old + "/svc/")); n > 0 {
					t.Errorf("the old scope still has %d services", n)
				}
				if old != federation.AllScope {
					if left := west.own.Dump("exports/v1/" + old + "/"); len(left) > 0 {
						t.Errorf("of the old scope %d keys are left", len(left))
					}
				}
				cancel()
				watching.Wait()
				want := 0
				if _, readable := map[string]bool{"": true, "east north": true}[strings.Join(move[1], " ")]; readable {
					want = 60
				}
				if n := endpoints(north.mesh.Load().Clusterset(), "west"); n != want {
					t.Errorf("north has %d endpoints after the move, want %d", n, want)
				}
			})
		})
	}
}
