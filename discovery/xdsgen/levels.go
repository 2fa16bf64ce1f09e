package xdsgen

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/discovery"
	"github.com/hanse-mesh/hanse/identity"
)

// maxPerLevel bounds the endpoints that one sidecar uses of a level.
const maxPerLevel = 32

// maxWeight bounds an endpoint's weight, so that the sum of a level's stays within the 32 bits that xDS has for it.
const maxWeight = 1 << 15

// minCallers is how many callers of a service must be known before their shares decide about a zone level.
const minCallers = 10

// Levels are the endpoints of a service port in the order in which one viewer uses them.
type Levels struct {
	Authority string                 `json:"authority"`
	Service   discovery.Name         `json:"service"`
	Port      discovery.Port         `json:"port"`
	Mode      discovery.LocalityMode `json:"mode"`
	Levels    []Level                `json:"levels"`
	Omitted   []Omitted              `json:"omitted,omitempty"`
	Subset    bool                   `json:"subset,omitempty"` // some level was cut to the viewer's share of its endpoints
}

// Level is one priority, most preferred first.
type Level struct {
	Name      string   `json:"name"`      // why these come together: "same zone", "other cluster, same region", …
	Total     int      `json:"total"`     // endpoints before the cut to the viewer's subset
	Endpoints []Ranked `json:"endpoints"` // sorted by cluster, region, zone, ID
}

// Ranked is an endpoint within a level.
type Ranked struct {
	ID        string              `json:"id"`
	Locality  discovery.Locality  `json:"locality"`
	Address   netip.AddrPort      `json:"address"`
	Gateways  []netip.AddrPort    `json:"gateways,omitempty"` // set where the endpoint is on another network
	SNI       string              `json:"sni,omitempty"`
	SPIFFEID  string              `json:"spiffeID,omitempty"`
	Transport discovery.Transport `json:"transport"`
	Weight    uint32              `json:"weight"`
	Ready     bool                `json:"ready"`
	Draining  bool                `json:"draining,omitempty"`
	Suspect   bool                `json:"suspect,omitempty"`
	Reason    string              `json:"reason"`

	share int // Weigh: index into TrafficPolicy.Weights
}

// Omitted is an endpoint, or a whole cluster's part, that is not used.
type Omitted struct {
	Cluster string `json:"cluster"`
	ID      string `json:"id,omitempty"` // empty: all of the cluster's endpoints
	Reason  string `json:"reason"`
}

// rank is where an endpoint stands; lower is preferred.
type rank struct {
	demoted bool
	order   int
	name    string
}

// Default order (design D6).
const (
	sameZone = iota
	sameRegion
	sameCluster
	otherSameRegion
	otherCluster
)

var defaultNames = [...]string{"same zone", "same region", "same cluster", "other cluster, same region", "other cluster"}

// Levels ranks the endpoints behind an authority for a viewer and says why each is where it is. The error says why there is
// nothing to rank: the authority names no service or no port.
func (v *View) Levels(viewer *Viewer, authority string) (*Levels, error) {
	c, err := v.lookup(authority)
	if err != nil {
		return nil, err
	}
	return v.levels(viewer, c), nil
}

func (v *View) levels(viewer *Viewer, c *callee) *Levels {
	out := &Levels{Authority: c.authority, Service: c.name, Port: c.port, Mode: cmp.Or(c.policy.Mode, discovery.ModeFailover)}
	mergeZone := v.mergeZone(viewer, c)
	byRank := make(map[rank][]Ranked)
	for i := range c.parts {
		p := &c.parts[i]
		if reason := v.unusable(p); reason != "" {
			out.Omitted = append(out.Omitted, Omitted{Cluster: p.cluster, Reason: reason})
			continue
		}
		if p.withheld > 0 {
			out.Omitted = append(out.Omitted, Omitted{Cluster: p.cluster, Reason: fmt.Sprintf("%d of its endpoints have SPIFFE IDs that may not serve %s here (%s)", p.withheld, p.service, allowPolicy)})
		}
		for _, e := range p.endpoints {
			r, reason := v.ranked(viewer, p, e)
			if reason == "" {
				var k rank
				if k, r.share, reason = place(viewer, c.policy, out.Mode, p, e, mergeZone); reason == "" {
					r.Reason = k.name
					if r.Suspect {
						r.Reason += "; its control plane is silent"
						if k.demoted {
							r.Reason += ", so it is ranked below fresh clusters"
						}
					}
					byRank[k] = append(byRank[k], r)
					continue
				}
			}
			out.Omitted = append(out.Omitted, Omitted{Cluster: p.cluster, ID: e.ID, Reason: reason})
		}
	}
	ranks := make([]rank, 0, len(byRank))
	for k := range byRank {
		ranks = append(ranks, k)
	}
	slices.SortFunc(ranks, func(a, b rank) int {
		return cmp.Or(cmpBool(a.demoted, b.demoted), cmp.Compare(a.order, b.order))
	})
	cut := viewer.Kind == Sidecar && !hashes(c) && !c.headless // whose endpoints are called one by one
	for _, k := range ranks {
		l := Level{Name: k.name, Endpoints: byRank[k], Total: len(byRank[k])}
		if k.demoted {
			l.Name += ", suspect"
		}
		if cut && l.Total > maxPerLevel {
			l.Endpoints, out.Subset = subset(viewer.ID, l.Endpoints), true
		}
		slices.SortFunc(l.Endpoints, func(a, b Ranked) int {
			return cmp.Or(compareLocality(a.Locality, b.Locality), cmp.Compare(a.ID, b.ID))
		})
		out.Levels = append(out.Levels, l)
	}
	return out
}

// hashes reports whether requests are spread by a hash, which needs every endpoint.
func hashes(c *callee) bool {
	return c.policy.LoadBalancer == "RingHash" || c.policy.LoadBalancer == "" && c.affinity == "ClientIP"
}

// unusable says why nothing of a part can be called, or "".
func (v *View) unusable(p *part) string {
	switch {
	case p.noPort:
		return fmt.Sprintf("cluster %s's service lacks this port", p.cluster)
	case p.state() == discovery.Withdrawn:
		return fmt.Sprintf("cluster %s is withdrawn: neither its control plane nor its data path answers", p.cluster)
	}
	return ""
}

// ranked says how an endpoint is reached, or why it is not.
func (v *View) ranked(viewer *Viewer, p *part, e *discovery.Endpoint) (Ranked, string) {
	r := Ranked{
		ID:        e.ID,
		Locality:  discovery.Locality{Cluster: p.cluster, Region: cmp.Or(e.Locality.Region, p.region), Zone: e.Locality.Zone},
		Address:   e.DialAddress(p.portName),
		SPIFFEID:  e.SPIFFEID,
		Transport: e.Transport,
		Weight:    min(max(e.Weight, 1), maxWeight),
		Ready:     e.Ready,
		Draining:  e.Draining,
		Suspect:   p.state() == discovery.Suspect,
	}
	switch {
	case e.Ports[p.portName] == 0:
		return r, fmt.Sprintf("it does not serve port %q", p.portName)
	case e.Transport == discovery.Plaintext && !p.plaintext:
		return r, "it has no identity (plaintext), and the service does not permit that"
	case e.Transport == discovery.Plaintext && viewer.Kind == GRPC:
		return r, "it has no identity (plaintext), and gRPC clients use mutual TLS"
	case e.Transport != discovery.Plaintext && e.SPIFFEID == "":
		return r, "it has no SPIFFE ID"
	case e.SPIFFEID != "" && !v.trusts(e.SPIFFEID):
		return r, fmt.Sprintf("trust domain %s is not trusted here", trustDomain(e.SPIFFEID))
	case e.SPIFFEID != "" && !v.allows(p.service, e.SPIFFEID):
		return r, fmt.Sprintf("%s may not serve %s here (%s)", e.SPIFFEID, p.service, allowPolicy)
	}
	if e.Network != viewer.Network {
		if len(p.gateways) == 0 {
			return r, fmt.Sprintf("it is on network %q, and cluster %s has no gateway", e.Network, p.cluster)
		}
		if e.Transport == discovery.Plaintext {
			return r, "it has no identity (plaintext), and gateways pass only sealed connections"
		}
		r.Gateways, r.SNI = p.gateways, endpointSNI(e, e.Ports[p.portName])
	}
	return r, ""
}

// trusts reports whether the bundle of id's trust domain is known; the own one always is. Without any knowledge of trust
// everything is.
func (v *View) trusts(id string) bool {
	td := trustDomain(id)
	_, ok := v.Set.Trusted[td]
	return ok || len(v.Set.Trusted) == 0 || td == v.Set.Local.Self.TrustDomain
}

// allowPolicy is where it is said who may serve what.
const allowPolicy = "spec.allow of its trust domain, or spec.import of the Peer"

// allows reports whether an ID may serve a service, by spec.allow of its trust domain.
func (v *View) allows(service discovery.Name, id string) bool {
	rules := v.Set.Local.AllowOf(trustDomain(id))
	if len(rules) == 0 {
		return true
	}
	parsed, err := spiffeid.FromString(id)
	return err == nil && discovery.Allowed(rules, service, func(pattern string) bool { return identity.MatchPattern(pattern, parsed) })
}

func trustDomain(id string) string {
	td, _, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
	return td
}

// place ranks an endpoint by the policy's mode, or says why the policy leaves it out.
func place(viewer *Viewer, policy *discovery.TrafficPolicy, mode discovery.LocalityMode, p *part, e *discovery.Endpoint, mergeZone bool) (k rank, share int, reason string) {
	suspect := p.state() == discovery.Suspect
	at := discovery.Locality{Cluster: p.cluster, Region: cmp.Or(e.Locality.Region, p.region), Zone: e.Locality.Zone}
	switch mode {
	case discovery.ModeBalance:
		return rank{demoted: suspect, name: "balanced over all"}, 0, ""
	case discovery.ModeWeigh:
		for i, w := range policy.Weights {
			if w.Weight > 0 && matches(w.LocalityMatch, at, viewer) {
				return rank{name: "weighed"}, i, ""
			}
		}
		return k, 0, "the TrafficPolicy gives its locality no weight"
	}
	for i, m := range policy.Order {
		if matches(m, at, viewer) {
			k = rank{order: i - len(policy.Order), name: "order " + describe(m)}
			k.demoted = suspect && mode == discovery.ModeFailover
			return k, 0, ""
		}
	}
	if mode == discovery.ModePin {
		return k, 0, "the TrafficPolicy pins other localities"
	}
	order := defaultOrder(viewer, at)
	if mergeZone && order == sameZone {
		order = sameRegion
	}
	return rank{demoted: suspect, order: order, name: defaultNames[order]}, 0, ""
}

func defaultOrder(viewer *Viewer, at discovery.Locality) int {
	region := at.Region == viewer.Region
	switch {
	case at.Cluster == viewer.Cluster && region && at.Zone != "" && at.Zone == viewer.Zone:
		return sameZone
	case at.Cluster == viewer.Cluster && region:
		return sameRegion
	case at.Cluster == viewer.Cluster:
		return sameCluster
	case region && at.Region != "":
		return otherSameRegion
	}
	return otherCluster
}

// matches compares a locality; "$self" in a match is the viewer's own value.
func matches(m discovery.LocalityMatch, at discovery.Locality, viewer *Viewer) bool {
	is := func(want, self, have string) bool {
		return want == "" || want == have || want == "$self" && self == have
	}
	return is(m.Cluster, viewer.Cluster, at.Cluster) && is(m.Region, viewer.Region, at.Region) && is(m.Zone, viewer.Zone, at.Zone)
}

func describe(m discovery.LocalityMatch) string {
	return cmp.Or(m.Cluster, "*") + "/" + cmp.Or(m.Region, "*") + "/" + cmp.Or(m.Zone, "*")
}

// mergeZone reports whether the viewer's zone has too few endpoints for a level of its own: its share of the region's ready
// endpoints is less than half its share of the region's callers (protocol "Levels"). Unknown callers change nothing.
func (v *View) mergeZone(viewer *Viewer, c *callee) bool {
	var zoneCallers, callers int
	for l, n := range v.Callers[c.name] {
		if l.Cluster == viewer.Cluster && l.Region == viewer.Region {
			callers += n
			if l.Zone == viewer.Zone {
				zoneCallers += n
			}
		}
	}
	if callers < minCallers {
		return false
	}
	var zone, all int
	for i := range c.parts {
		p := &c.parts[i]
		if p.member != nil {
			continue
		}
		for _, e := range p.endpoints {
			if e.Ready && cmp.Or(e.Locality.Region, p.region) == viewer.Region {
				all++
				if e.Locality.Zone == viewer.Zone {
					zone++
				}
			}
		}
	}
	return 2*zone*callers < zoneCallers*all
}

// subset keeps the maxPerLevel endpoints that score highest for this viewer (rendezvous hashing): when an endpoint comes or
// goes, at most one of them is replaced. The choice ignores weights, which then keep their meaning in expectation.
func subset(viewerID string, all []Ranked) []Ranked {
	type scored struct {
		score uint64
		i     int
	}
	s := make([]scored, len(all))
	for i := range all {
		h := fnv.New64a()
		h.Write([]byte(viewerID))
		h.Write([]byte{0})
		h.Write([]byte(all[i].ID))
		s[i] = scored{mix(h.Sum64()), i}
	}
	slices.SortFunc(s, func(a, b scored) int {
		return cmp.Or(cmp.Compare(b.score, a.score), cmp.Compare(all[a.i].ID, all[b.i].ID))
	})
	out := make([]Ranked, maxPerLevel)
	for i := range out {
		out[i] = all[s[i].i]
	}
	return out
}

// mix spreads FNV's weak last bits over the word (the finaliser of MurmurHash3).
func mix(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}

func compareLocality(a, b discovery.Locality) int {
	return cmp.Or(cmp.Compare(a.Cluster, b.Cluster), cmp.Compare(a.Region, b.Region), cmp.Compare(a.Zone, b.Zone))
}

func cmpBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}
