package peering_test

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/rogpeppe/go-internal/txtar"

	"github.com/hanse-mesh/hanse/discovery"
)

var update = flag.Bool("update", false, "rewrite the wanted states in testdata; read the diff")

// TestScripts runs testdata/*.txtar: a script over control planes in one process, and the states that it compares with.
//
//	cluster NAME                      a cluster, its gateway and its control plane
//	export CLUSTER SERVICE N [FOR…]   N endpoints of ns/name; 0 takes the export away; FOR is the audience
//	peer CLUSTER MEMBER KEY=VALUE…    a Peer object: introductions, namespaces, labels, disabled
//	join JOINER ISSUER                with a new token; "! join" must fail
//	leave CLUSTER [MEMBER] [force]    "! leave" must fail
//	accept CLUSTER MEMBER             a person's word
//	partition A B, heal A B           nothing passes between their control planes; gateways answer
//	kill CLUSTER, restart CLUSTER     the control plane; its stores stay
//	gateway CLUSTER up|down
//	advance DURATION
//	cmp CLUSTER FILE                  the state of a cluster
//	keep CLUSTER, unchanged CLUSTER   the svc/ and ep/ keys that it exports
//	records CLUSTER MEMBER            of the members/ keys that were kept, that member's has changed (or come), and no other
//	announce CLUSTER                  a restart of its control plane
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}
			synctest.Test(t, func(t *testing.T) {
				s := &script{t: t, w: newWorld(t), archive: a, kept: map[string]map[string]string{}, records: map[string]map[string]string{}, ids: map[string]string{}}
				defer s.w.stop()
				for n, line := range strings.Split(string(a.Comment), "\n") {
					line, _, _ = strings.Cut(line, "#")
					if f := strings.Fields(line); len(f) > 0 {
						if err := s.run(f); err != nil {
							t.Fatalf("%s:%d: %s: %v", file, n+1, line, err)
						}
					}
				}
			})
			if *update && !t.Failed() {
				if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

type script struct {
	t       *testing.T
	w       *world
	archive *txtar.Archive
	kept    map[string]map[string]string
	records map[string]map[string]string
	ids     map[string]string // of members, by name
}

// stripBookkeeping leaves what is about members.
func stripBookkeeping(keys map[string]string) map[string]string {
	out := maps.Clone(keys)
	maps.DeleteFunc(out, func(k, _ string) bool { return strings.Contains(k, "!") || strings.HasSuffix(k, "/meta") })
	return out
}

func (s *script) run(f []string) error {
	if f[0] == "!" {
		err := s.run(f[1:])
		if err == nil {
			return fmt.Errorf("succeeded")
		}
		s.t.Logf("%s: %v", strings.Join(f, " "), err)
		return nil
	}
	if f[0] == "cluster" {
		s.w.add(f[1])
		return nil
	}
	if f[0] == "advance" {
		d, err := time.ParseDuration(f[1])
		time.Sleep(d)
		synctest.Wait()
		return err
	}
	c := s.w.clusters[f[1]]
	if c == nil {
		return fmt.Errorf("no cluster %q", f[1])
	}
	ctx, m := s.t.Context(), c.mesh.Load()
	if m != nil {
		s.ids[c.name] = m.Status().Self.ID
	}
	switch f[0] {
	case "export":
		n, err := strconv.Atoi(f[3])
		ns, name, _ := strings.Cut(f[2], "/")
		c.export(discovery.Name{Namespace: ns, Name: name}, n, f[4:]...)
		return err
	case "peer":
		c.peer(f[2], f[3:])
	case "join":
		return s.w.join(f[1], f[2])
	case "leave":
		member, force := "", false
		for _, a := range f[2:] {
			if a == "force" {
				force = true
			} else {
				member = a
			}
		}
		_, err := m.Leave(ctx, member, force)
		return err
	case "accept":
		return m.AcceptHeld(ctx, f[2])
	case "partition", "heal":
		s.w.partition(f[1], f[2], f[0] == "partition")
	case "kill":
		c.stop()
	case "restart":
		c.start()
		c.healLinks()
	case "gateway":
		s.w.gateway(c, f[2] == "up")
	case "announce":
		return m.AnnounceRestart(ctx, time.Minute)
	case "keep":
		s.kept[f[1]], s.records[f[1]] = c.serviceKeys(), c.own.Dump("exports/v1/members/")
	case "records":
		of := "exports/v1/members/" + s.ids[f[2]]
		is, was := c.own.Dump("exports/v1/members/"), maps.Clone(s.records[f[1]])
		if is[of] == was[of] {
			return fmt.Errorf("the record of %s has not changed", f[2])
		}
		was[of] = is[of]
		if is := stripBookkeeping(is); !maps.Equal(is, stripBookkeeping(was)) {
			return fmt.Errorf("other records have changed, too:\n%q\n%q", is, was)
		}
	case "unchanged":
		if got := c.serviceKeys(); !maps.Equal(got, s.kept[f[1]]) {
			return fmt.Errorf("exported keys are not byte-identical:\n%q\n%q", got, s.kept[f[1]])
		}
	case "cmp":
		return s.cmp(c, f[2])
	default:
		return fmt.Errorf("unknown command %q", f[0])
	}
	return nil
}

func (s *script) cmp(c *cluster, name string) error {
	got := append(c.state(), '\n')
	for i := range s.archive.Files {
		file := &s.archive.Files[i]
		if file.Name != name {
			continue
		}
		if *update {
			file.Data = got
		}
		if !bytes.Equal(got, file.Data) {
			return fmt.Errorf("state of %s is\n%s", c.name, got)
		}
		return nil
	}
	if *update {
		s.archive.Files = append(s.archive.Files, txtar.File{Name: name, Data: got})
		return nil
	}
	return fmt.Errorf("no file %s", name)
}

// state is what a cluster knows, without ages.
func (c *cluster) state() []byte {
	type shown struct {
		Mesh    string                    `json:"mesh"`
		Self    string                    `json:"self"`
		Members map[string]string         `json:"members,omitempty"`
		Routed  map[string]string         `json:"states,omitempty"` // as the data path is told
		Imports map[string]map[string]int `json:"imports,omitempty"`
		Alarms  []string                  `json:"alarms,omitempty"`
		Trusted []string                  `json:"trusted"`
	}
	m := c.mesh.Load()
	st, cs := m.Status(), m.Clusterset()
	out := shown{Mesh: st.Mesh, Self: string(st.Self.Standing), Members: map[string]string{}, Routed: map[string]string{}, Imports: map[string]map[string]int{}}
	for _, ms := range st.Members {
		out.Members[ms.Record.Name] = ms.State
		if ms.Mirror.Held != "" {
			out.Members[ms.Record.Name] += ", held"
		}
	}
	for name, member := range cs.Members {
		out.Routed[name] = string(member.State)
	}
	for name, imp := range cs.Imports.All() {
		from := map[string]int{}
		for _, f := range imp.From {
			from[f.Member] = len(f.Endpoints)
		}
		out.Imports[name.String()] = from
	}
	for _, a := range st.Alarms {
		out.Alarms = append(out.Alarms, c.w.anonymous(a))
	}
	out.Trusted = append(out.Trusted, slices.Sorted(maps.Keys(cs.Trusted))...)
	b, err := json.MarshalIndent(out, "", "  ")
	if err != nil {
		c.w.t.Fatal(err)
	}
	return b
}

// anonymous replaces the beginnings of random member IDs.
func (w *world) anonymous(s string) string {
	for name, c := range w.clusters {
		if m := c.mesh.Load(); m != nil {
			s = strings.ReplaceAll(s, m.Status().Self.ID[:8], "<"+name+">")
		}
	}
	return s
}

// serviceKeys are the svc/ and ep/ keys that a cluster exports.
func (c *cluster) serviceKeys() map[string]string {
	out := map[string]string{}
	for k, v := range c.own.Dump("exports/v1/") {
		if strings.Contains(k, "/svc/") || strings.Contains(k, "/ep/") {
			out[k] = v
		}
	}
	return out
}

// peer gives a cluster a Peer object.
func (c *cluster) peer(member string, settings []string) {
	next := *c.local
	next.Peers = maps.Clone(next.Peers)
	if next.Peers == nil {
		next.Peers = map[string]*discovery.Peer{}
	}
	p := &discovery.Peer{Name: member}
	for _, s := range settings {
		switch k, v, _ := strings.Cut(s, "="); k {
		case "introductions":
			p.Introductions = v
		case "namespaces":
			p.Namespaces = strings.Split(v, ",")
		case "labels":
			key, value, _ := strings.Cut(v, "=")
			p.Labels = map[string]string{key: value}
		case "disabled":
			p.Disabled = v == "true"
		}
	}
	next.Peers[member] = p
	c.setLocal(&next)
}
