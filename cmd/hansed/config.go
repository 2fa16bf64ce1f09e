package main

import (
	"bytes"
	"cmp"
	"crypto/elliptic"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/go-multierror"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"sigs.k8s.io/yaml"

	"github.com/hanse-mesh/hanse/cmd/internal/daemon"
	"github.com/hanse-mesh/hanse/identity/onspire"
)

// Config is hansed's configuration file. Durations are Go's ("1h", "90s"). Paths are relative to the file.
type Config struct {
	Cluster     string            `json:"cluster"`     // this cluster's name in the mesh, a DNS label
	TrustDomain string            `json:"trustDomain"` // its own; never another cluster's
	Mesh        string            `json:"mesh"`        // name of the mesh, for people; the first cluster's counts
	Region      string            `json:"region"`      // of its endpoints, where nothing else says theirs
	Network     string            `json:"network"`     // endpoints of other networks are reached through gateways; default: the cluster's name
	Gateways    []string          `json:"gateways"`    // ip:port or host:port of this cluster's gateways, as other clusters dial them; names are looked up again and again
	Labels      map[string]string `json:"labels"`      // of this member, for audiences
	Replica     string            `json:"replica"`     // name of this hansed among those of the cluster (with etcd.endpoints); default: the host's name

	DataDir   string  `json:"dataDir"`   // etcd, keys, bundles; 0700
	ConfigDir string  `json:"configDir"` // directory of Kubernetes YAML that is watched; optional
	KubeAPI   KubeAPI `json:"kubeAPI"`   // the API server whose objects are read, and told of imports; optional
	Socket    string  `json:"socket"`    // hanse's Unix socket; default /run/hanse/hansed.sock

	Federation Federation `json:"federation"`
	Identity   Identity   `json:"identity"`
	XDS        Listen     `json:"xds"` // for this cluster's proxies; default :7445
	Bundle     Bundles    `json:"bundleEndpoint"`
	Remote     Listen     `json:"remoteAdmin"` // off unless an address is given
	Admin      Listen     `json:"admin"`       // metrics and debug; loopback only; default 127.0.0.1:7440
	Health     Health     `json:"health"`      // for who has no identity, the kubelet above all; off unless an address is given
	Etcd       Etcd       `json:"etcd"`
	Log        Log        `json:"log"`

	// Timers are shortened by tests; production leaves them alone.
	Timers Timers `json:"timers"`
}

// Listen is one listener.
type Listen struct {
	Listen string `json:"listen"` // host:port or :port
}

// Bundles is the bundle endpoint (https_spiffe), and what https_web needs.
type Bundles struct {
	Listen   string `json:"listen"` // default :7446
	Web      Web    `json:"web"`
	WebRoots string `json:"webRoots"` // PEM file of who vouches for other trust domains' https_web endpoints; default: the system's roots
}

// Web is the bundle endpoint with the https_web profile; without listen there is none.
type Web struct {
	Listen   string `json:"listen"`   // host:port or :port
	CertFile string `json:"certFile"` // PEM files; they are read again when they change
	KeyFile  string `json:"keyFile"`  // PEM
}

// KubeAPI is an API server. In a pod its service account serves; elsewhere a kubeconfig does.
type KubeAPI struct {
	Enabled    bool   `json:"enabled"`    // whether there is one; default false
	Kubeconfig string `json:"kubeconfig"` // file; default: the pod's service account
	Context    string `json:"context"`    // of the kubeconfig; default: its current one

	Webhook Webhook `json:"webhook"` // sidecars for Pods, and verdicts on objects

	// Services (namespace/name) by whose load balancers, node ports or host ports other clusters reach this one. What they say is followed, and host names are looked up again and again.
	GatewayService    string `json:"gatewayService"`    // port "mesh"; beside gateways
	FederationService string `json:"federationService"` // port "federation"; instead of federation.advertise
}

// Health answers /livez and /readyz to whoever asks, and /metrics if it may.
type Health struct {
	Listen  string `json:"listen"`  // host:port or :port
	Metrics bool   `json:"metrics"` // whether /metrics is answered, too; default false
}

// Federation is the listener for other clusters.
type Federation struct {
	Listen    string   `json:"listen"`    // default :7443
	Advertise []string `json:"advertise"` // host:port as other clusters dial it; default: listen, unless that is unspecified
}

// Identity is the SPIRE Server API and the lives of what it signs.
type Identity struct {
	Listen   string   `json:"listen"`   // default :7444
	X509Life Duration `json:"x509Life"` // of workloads' X509-SVIDs; default 1h
	JWTLife  Duration `json:"jwtLife"`  // of JWT-SVIDs; default 5m
	RootLife Duration `json:"rootLife"` // of this control plane's root, which is replaced long before its end; default 168h
	Keys     Keys     `json:"keys"`     // that sign

	// SPIRE, where a server is given, issues instead of this control plane.
	SPIRE SPIRE `json:"spire"`

	// Entries for SPIRE's agents at this control plane: of the workloads of discovered services, as in spire.entries. With kubernetes.nodeAgents
	// and none given: by k8s:ns and k8s:sa, for all of these agents.
	Entries []SPIREEntry `json:"entries"`
	Linger  Duration     `json:"linger"` // how long such an entry outlives its workload; default 1m

	// Upstream, where given, signs this control plane's CA.
	Upstream Upstream `json:"upstream"`

	// Attestation is limited, by the address that it comes from and in all.
	Attestation Attestation `json:"attestation"`

	// Besides agent tokens, agents may show these.
	X509Pop    X509Pop    `json:"x509pop"`
	Kubernetes Kubernetes `json:"kubernetes"`
}

// Attestation is how many agents may attest. A burst is how many may at once; the rate refills it.
type Attestation struct {
	PerSecond    float64 `json:"perSecond"`    // of one address; default 20
	Burst        int     `json:"burst"`        // default 100
	AllPerSecond float64 `json:"allPerSecond"` // of all addresses together; default 10 times that of one
	AllBurst     int     `json:"allBurst"`     // likewise
}

// Keys says what the signing keys are like. They are PKCS#8 on disk, mode 0600.
type Keys struct {
	Curve   string `json:"curve"`   // P-256 (default) or P-384; another one is a rotation
	Storage string `json:"storage"` // disk (default) or memory, which needs upstream
}

// elliptic is the curve; validate has seen to it that there is one.
func (k Keys) elliptic() elliptic.Curve {
	if k.Curve == "P-384" {
		return elliptic.P384()
	}
	return elliptic.P256()
}

// SPIRE is a spire-server that was there before, and the spire-agent beside this control plane. listen, rootLife, x509pop and kubernetes
// are then without meaning; the lives of SVIDs are those of the entries that are made.
type SPIRE struct {
	Server      string `json:"server"`      // unix:///path of its admin socket; or host:port, where this control plane's own entry must be an administrator's
	WorkloadAPI string `json:"workloadAPI"` // unix:///path of the agent's socket

	// Of workloads of discovered services, of the control plane itself, and of its gateways. Parents and selectors are Go templates over
	// .TrustDomain .Cluster .Namespace .ServiceAccount .ID .Address .Hostname .Region .Zone. None: entries are people's to make.
	Entries      []SPIREEntry `json:"entries"`
	ControlPlane []SPIREEntry `json:"controlPlane"` // likewise, of the control plane
	Gateways     []SPIREEntry `json:"gateways"`     // likewise, of its gateways

	Linger         Duration `json:"linger"`         // how long an entry outlives its workload; default 1m
	BundleEndpoint string   `json:"bundleEndpoint"` // host:port at which spire-server reaches bundleEndpoint.listen; default: that, on 127.0.0.1 if unspecified
}

// Upstream is an authority above this control plane's own: a folder as cert-manager writes it, or files, or a spire-server. At most one.
type Upstream struct {
	Dir      string `json:"dir"`      // with tls.crt, tls.key and ca.crt
	CertFile string `json:"certFile"` // PEM: the CA certificate, then those between it and the root
	KeyFile  string `json:"keyFile"`  // PEM
	CAFile   string `json:"caFile"`   // PEM: the roots; may be missing where the CA is a root itself

	SPIRE UpstreamSPIRE `json:"spire"` // of the same trust domain; this control plane's SVID has a downstream entry there
}

// UpstreamSPIRE is a spire-server above this control plane.
type UpstreamSPIRE struct {
	Server      string `json:"server"`      // host:port
	WorkloadAPI string `json:"workloadAPI"` // unix:///path of the spire-agent that gives the SVID with the downstream entry
}

// SPIREEntry is a registration entry to be made.
type SPIREEntry struct {
	Parent    string   `json:"parent"`    // spiffe://{{.TrustDomain}}/k8s/nodes
	Selectors []string `json:"selectors"` // k8s:ns:{{.Namespace}}
}

// X509Pop lets SPIRE agents attest by a certificate that chains to a CA in the file, and its key. Off without a file.
type X509Pop struct {
	CAFile string `json:"caFile"` // PEM
}

// Kubernetes lets agents attest by a pod's projected token, which the API server is asked about. Off without a cluster.
type Kubernetes struct {
	Cluster    string   `json:"cluster"`    // as agents name it
	Server     string   `json:"server"`     // https://host:port of the API server; default: that of the pod's environment
	CAFile     string   `json:"caFile"`     // default: the pod's
	TokenFile  string   `json:"tokenFile"`  // of an account with ClusterRole system:auth-delegator; default: the pod's
	NodeAgents []string `json:"nodeAgents"` // <namespace>:<service account> of SPIRE agents (k8s_psat), one per node; default: none
	Audience   string   `json:"audience"`   // of the tokens of pods (hanse_pod); default "hanse"
	Gateways   []string `json:"gateways"`   // <namespace>:<service account> of this cluster's gateways (hanse_pod); default: none
}

// Etcd is where state lives: embedded, unless endpoints are given.
type Etcd struct {
	Endpoints  []string `json:"endpoints"`  // URLs of an etcd that is this cluster's alone; default: the embedded one
	Prefix     string   `json:"prefix"`     // refused: other clusters read exports at their fixed keys
	CertFile   string   `json:"certFile"`   // PEM, of the client; read again at the next connection
	KeyFile    string   `json:"keyFile"`    // PEM
	CAFile     string   `json:"caFile"`     // PEM: whose certificates etcd may have
	QuotaBytes int64    `json:"quotaBytes"` // embedded; default 2 GiB for own and for imports
}

// Log is where and how much.
type Log struct {
	Level string `json:"level"` // debug, info (default), warn, error
}

// Timers of the federation layer. Zero is the default of the protocol.
type Timers struct {
	Suspect     Duration `json:"suspect"`     // silence until a peer is suspect; 20s
	Recover     Duration `json:"recover"`     // answers until it is fresh again; 10s
	Probe       Duration `json:"probe"`       // between probes; 5s
	ExportDelay Duration `json:"exportDelay"` // debounce of exports; 100ms
	Leader      Duration `json:"leader"`      // after which a leader that has died is followed; whole seconds, 5s
}

// Duration reads "90s" from YAML.
type Duration struct{ time.Duration }

// UnmarshalJSON reads a duration string.
func (d *Duration) UnmarshalJSON(b []byte) error {
	s := string(bytes.Trim(b, `"`))
	v, err := time.ParseDuration(s)
	if err != nil {
		return fmt.Errorf("duration %s: want a number with a unit, such as 90s or 1h30m", b)
	}
	d.Duration = v
	return nil
}

const maxConfigSize = 1 << 20

// LoadConfig reads and checks a file. Every fault is in the error.
func LoadConfig(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfigSize+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(b) > maxConfigSize {
		return nil, fmt.Errorf("%s: larger than 1 MiB", path)
	}
	c := &Config{}
	if err := yaml.UnmarshalStrict(b, c); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	dir := filepath.Dir(path)
	for _, p := range []*string{&c.DataDir, &c.ConfigDir, &c.Socket, &c.Bundle.WebRoots, &c.Bundle.Web.CertFile, &c.Bundle.Web.KeyFile, &c.Etcd.CertFile, &c.Etcd.KeyFile, &c.Etcd.CAFile,
		&c.Identity.X509Pop.CAFile, &c.Identity.Upstream.Dir, &c.Identity.Upstream.CertFile, &c.Identity.Upstream.KeyFile, &c.Identity.Upstream.CAFile, &c.KubeAPI.Kubeconfig, &c.Identity.Kubernetes.CAFile, &c.Identity.Kubernetes.TokenFile} {
		if *p != "" && !filepath.IsAbs(*p) {
			*p = filepath.Join(dir, *p)
		}
	}
	c.fill()
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

func (c *Config) fill() {
	c.Network = cmp.Or(c.Network, c.Cluster)
	c.Mesh = cmp.Or(c.Mesh, "hanse")
	c.Socket = cmp.Or(c.Socket, "/run/hanse/hansed.sock")
	c.Federation.Listen = cmp.Or(c.Federation.Listen, ":7443")
	c.Identity.Listen = cmp.Or(c.Identity.Listen, ":7444")
	c.XDS.Listen = cmp.Or(c.XDS.Listen, ":7445")
	c.Bundle.Listen = cmp.Or(c.Bundle.Listen, ":7446")
	c.Admin.Listen = cmp.Or(c.Admin.Listen, "127.0.0.1:7440")
	c.Log.Level = cmp.Or(c.Log.Level, "info")
	def := func(d *Duration, v time.Duration) { d.Duration = cmp.Or(d.Duration, v) }
	a := &c.Identity.Attestation
	a.PerSecond, a.Burst = cmp.Or(a.PerSecond, 20), cmp.Or(a.Burst, 100)
	a.AllPerSecond, a.AllBurst = cmp.Or(a.AllPerSecond, 10*a.PerSecond), cmp.Or(a.AllBurst, 10*a.Burst)
	c.Identity.Keys.Curve, c.Identity.Keys.Storage = cmp.Or(c.Identity.Keys.Curve, "P-256"), cmp.Or(c.Identity.Keys.Storage, "disk")
	def(&c.Identity.X509Life, time.Hour)
	def(&c.Identity.JWTLife, 5*time.Minute)
	def(&c.Identity.RootLife, 7*24*time.Hour)
	def(&c.Identity.SPIRE.Linger, time.Minute)
	def(&c.Identity.Linger, time.Minute)
	def(&c.Timers.Suspect, 20*time.Second)
	def(&c.Timers.Recover, 10*time.Second)
	def(&c.Timers.Probe, 5*time.Second)
	def(&c.Timers.ExportDelay, 100*time.Millisecond)
	def(&c.Timers.Leader, 5*time.Second)
	if c.Replica == "" {
		c.Replica, _ = os.Hostname() // Validate complains of none
	}
	c.Etcd.QuotaBytes = cmp.Or(c.Etcd.QuotaBytes, 2<<30)
	c.fillWebhook(daemon.Version)
	if len(c.Federation.Advertise) == 0 {
		if h, _, err := net.SplitHostPort(c.Federation.Listen); err == nil {
			if a, err := netip.ParseAddr(h); err == nil && !a.IsUnspecified() {
				c.Federation.Advertise = []string{c.Federation.Listen}
			}
		}
	}
}

// replicaName is one segment of keys in etcd, and a host's name.
var replicaName = regexp.MustCompile(`^[A-Za-z0-9]([-A-Za-z0-9._]{0,251}[A-Za-z0-9])?$`)

var dnsLabel = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)

func validPort(s string) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n > 0
}

func unspecified(host string) bool {
	a, err := netip.ParseAddr(host)
	return err == nil && a.IsUnspecified()
}

// Validate reports every fault together.
func (c *Config) Validate() error {
	var faults *multierror.Error
	bad := func(field, format string, args ...any) {
		faults = multierror.Append(faults, fmt.Errorf("%s: %s", field, fmt.Sprintf(format, args...)))
	}
	if !dnsLabel.MatchString(c.Cluster) {
		bad("cluster", "%q is not a DNS label (lower-case letters, digits and -, at most 63)", c.Cluster)
	}
	if _, err := spiffeid.TrustDomainFromString(c.TrustDomain); err != nil {
		bad("trustDomain", "%q: %v", c.TrustDomain, err)
	}
	if c.DataDir == "" {
		bad("dataDir", "missing: say where etcd and keys are kept")
	}
	for i, g := range c.Gateways {
		if h, port, err := net.SplitHostPort(g); err != nil || h == "" || !validPort(port) || unspecified(h) {
			bad(fmt.Sprintf("gateways[%d]", i), "%q is not an ip:port or host:port that other clusters can dial", g)
		}
	}
	for _, l := range []struct{ field, addr string }{
		{"federation.listen", c.Federation.Listen}, {"identity.listen", c.Identity.Listen}, {"xds.listen", c.XDS.Listen},
		{"bundleEndpoint.listen", c.Bundle.Listen}, {"admin.listen", c.Admin.Listen}, {"remoteAdmin.listen", c.Remote.Listen}, {"health.listen", c.Health.Listen},
	} {
		if l.addr == "" && (l.field == "remoteAdmin.listen" || l.field == "health.listen") {
			continue
		}
		if _, _, err := net.SplitHostPort(l.addr); err != nil {
			bad(l.field, "%q is not host:port", l.addr)
		}
	}
	if w := c.Bundle.Web; w != (Web{}) {
		if _, _, err := net.SplitHostPort(w.Listen); err != nil {
			bad("bundleEndpoint.web.listen", "%q is not host:port", w.Listen)
		}
		if w.CertFile == "" || w.KeyFile == "" {
			bad("bundleEndpoint.web", "certFile and keyFile must be given: the certificate that web clients are to see")
		}
	}
	if h, _, err := net.SplitHostPort(c.Admin.Listen); err == nil {
		if a, err := netip.ParseAddr(h); (err != nil || !a.IsLoopback()) && h != "localhost" {
			bad("admin.listen", "%q is not a loopback address: metrics and debug are for this machine only", c.Admin.Listen)
		}
	}
	for i, a := range c.Federation.Advertise {
		if h, _, err := net.SplitHostPort(a); err != nil || h == "" {
			bad(fmt.Sprintf("federation.advertise[%d]", i), "%q is not host:port", a)
		}
	}
	if c.Identity.RootLife.Duration < 4*c.Identity.X509Life.Duration {
		bad("identity.rootLife", "%s is less than four times x509Life (%s): a root must outlive what it signs by two rotations", c.Identity.RootLife, c.Identity.X509Life)
	}
	a := c.Identity.Attestation
	for field, v := range map[string]float64{"perSecond": a.PerSecond, "burst": float64(a.Burst), "allPerSecond": a.AllPerSecond, "allBurst": float64(a.AllBurst)} {
		if !(v > 0 && v <= 1e6) {
			bad("identity.attestation."+field, "%v is not above 0 and at most a million", v)
		}
	}
	if a.AllPerSecond < a.PerSecond || a.AllBurst < a.Burst {
		bad("identity.attestation", "all addresses together may do less (%v/s, burst %d) than one of them (%v/s, burst %d)", a.AllPerSecond, a.AllBurst, a.PerSecond, a.Burst)
	}
	switch k := c.Identity.Keys; {
	case k.Curve != "P-256" && k.Curve != "P-384":
		bad("identity.keys.curve", "%q is not one of P-256, P-384", k.Curve)
	case k.Storage != "disk" && k.Storage != "memory":
		bad("identity.keys.storage", "%q is not one of disk, memory", k.Storage)
	case k.Storage == "memory" && (c.Identity.Upstream == Upstream{}):
		bad("identity.keys.storage", "memory needs identity.upstream: without one nobody would know the keys of the next start, and all agents were shut out")
	}
	if c.Identity.X509Life.Duration < time.Second || c.Identity.JWTLife.Duration < time.Second {
		bad("identity", "lives under 1s")
	}
	for i, e := range c.Etcd.Endpoints {
		u, err := url.Parse(e)
		if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
			bad(fmt.Sprintf("etcd.endpoints[%d]", i), "%q is not the address of an etcd, such as https://10.0.0.7:2379", e)
		}
	}
	if len(c.Etcd.Endpoints) > 0 && !replicaName.MatchString(c.Replica) {
		bad("replica", "%q is not a name of letters, digits, - . and _, at most 253: give this hansed one that no other of the cluster has", c.Replica)
	}
	if c.Etcd.Prefix != "" {
		bad("etcd.prefix", "%q: other clusters read exports at their fixed keys; give each cluster an etcd of its own and remove the prefix", c.Etcd.Prefix)
	}
	if l := c.Timers.Leader.Duration; l < time.Second || l%time.Second != 0 {
		bad("timers.leader", "%s: want whole seconds, at least 1s", l)
	}
	if k := c.Identity.Kubernetes; k.Cluster == "" && (k.Server != "" || k.CAFile != "" || k.TokenFile != "" || len(k.NodeAgents) > 0 || len(k.Gateways) > 0 || k.Audience != "") {
		bad("identity.kubernetes.cluster", "missing: say by which name agents know this cluster")
	} else if k.Server != "" && !strings.HasPrefix(k.Server, "https://") {
		bad("identity.kubernetes.server", "%q: want https://host:port", k.Server)
	}
	for field, accounts := range map[string][]string{"nodeAgents": c.Identity.Kubernetes.NodeAgents, "gateways": c.Identity.Kubernetes.Gateways} {
		for i, a := range accounts {
			if ns, sa, ok := strings.Cut(a, ":"); !ok || ns == "" || sa == "" || strings.Contains(sa, ":") {
				bad(fmt.Sprintf("identity.kubernetes.%s[%d]", field, i), "%q: want <namespace>:<service account>, such as spire:spire-agent", a)
			}
		}
	}
	for field, s := range map[string]string{"gatewayService": c.KubeAPI.GatewayService, "federationService": c.KubeAPI.FederationService} {
		if ns, name, ok := strings.Cut(s, "/"); s != "" && (!ok || !dnsLabel.MatchString(ns) || !dnsLabel.MatchString(name)) {
			bad("kubeAPI."+field, "%q: want namespace/name of a Service", s)
		} else if s != "" && !c.KubeAPI.Enabled {
			bad("kubeAPI.enabled", "false, although %s is given: set it to true, or remove it", field)
		}
	}
	c.validateSPIRE(bad)
	c.validateUpstream(bad)
	if k := c.KubeAPI; !k.Enabled && (k.Kubeconfig != "" || k.Context != "") {
		bad("kubeAPI.enabled", "false, although a kubeconfig or context is given: set it to true, or remove them")
	}
	c.validateWebhook(bad)
	if (c.Etcd.CertFile == "") != (c.Etcd.KeyFile == "") {
		bad("etcd", "certFile and keyFile go together")
	}
	switch c.Log.Level {
	case "debug", "info", "warn", "error":
	default:
		bad("log.level", "%q: want debug, info, warn or error", c.Log.Level)
	}
	if faults.ErrorOrNil() == nil {
		return nil
	}
	faults.ErrorFormat = func(errs []error) string {
		s := fmt.Sprintf("%d faults:", len(errs))
		for _, e := range errs {
			s += "\n  " + e.Error()
		}
		return s
	}
	if len(faults.Errors) == 1 {
		return errors.Unwrap(faults)
	}
	return faults
}

func (c *Config) validateUpstream(bad func(field, format string, args ...any)) {
	u, n := c.Identity.Upstream, 0
	for _, set := range []bool{u.Dir != "", u.CertFile != "", u.SPIRE.Server != ""} {
		n += b2i(set)
	}
	switch {
	case n > 1:
		bad("identity.upstream", "dir, certFile and spire exclude each other: there is one authority above this one")
	case n == 1 && c.Identity.SPIRE.Server != "":
		bad("identity.upstream", "with identity.spire this control plane signs nothing: remove one of them")
	case n == 0 && u != (Upstream{}):
		bad("identity.upstream", "give dir, or certFile and keyFile, or spire.server and spire.workloadAPI")
	}
	if (u.CertFile == "") != (u.KeyFile == "") {
		bad("identity.upstream", "certFile and keyFile go together")
	}
	if u.SPIRE.Server == "" {
		return
	}
	if _, port, err := net.SplitHostPort(u.SPIRE.Server); err != nil || port == "" {
		bad("identity.upstream.spire.server", "%q is not host:port", u.SPIRE.Server)
	}
	if path, local := strings.CutPrefix(u.SPIRE.WorkloadAPI, "unix://"); !local || !filepath.IsAbs(path) {
		bad("identity.upstream.spire.workloadAPI", "%q: want unix:// and the absolute path of the spire-agent's socket, such as unix:///run/spire/agent/api.sock", u.SPIRE.WorkloadAPI)
	}
}

func (c *Config) validateSPIRE(bad func(field, format string, args ...any)) {
	s, i := c.Identity.SPIRE, c.Identity
	for n, e := range i.Entries {
		if _, err := onspire.ParseTemplate(e.Parent, e.Selectors); err != nil {
			bad(fmt.Sprintf("identity.entries[%d]", n), "%v", err)
		}
	}
	if i.Linger.Duration < 0 {
		bad("identity.linger", "%s is negative", i.Linger)
	}
	if s.Server != "" && len(i.Entries) > 0 {
		bad("identity.entries", "this control plane is no authority: give identity.spire.entries")
	}
	if s.Server == "" {
		if s.WorkloadAPI != "" || len(s.Entries)+len(s.ControlPlane)+len(s.Gateways) > 0 || s.BundleEndpoint != "" {
			bad("identity.spire.server", "missing: the address of spire-server, such as unix:///run/spire/server/api.sock")
		}
		return
	}
	if path, local := strings.CutPrefix(s.Server, "unix://"); local && !filepath.IsAbs(path) {
		bad("identity.spire.server", "%q: want unix:// and an absolute path, such as unix:///run/spire/server/api.sock", s.Server)
	} else if _, port, err := net.SplitHostPort(s.Server); !local && (err != nil || port == "") {
		bad("identity.spire.server", "%q is neither unix:///path nor host:port", s.Server)
	}
	if path, local := strings.CutPrefix(s.WorkloadAPI, "unix://"); !local || !filepath.IsAbs(path) {
		bad("identity.spire.workloadAPI", "%q: want unix:// and the absolute path of the spire-agent's socket, such as unix:///run/spire/agent/api.sock", s.WorkloadAPI)
	}
	if s.BundleEndpoint != "" {
		if h, _, err := net.SplitHostPort(s.BundleEndpoint); err != nil || h == "" {
			bad("identity.spire.bundleEndpoint", "%q is not host:port", s.BundleEndpoint)
		}
	}
	if i.X509Pop.CAFile != "" || i.Kubernetes.Cluster != "" {
		bad("identity.spire", "agents attest at spire-server: configure its attestors, and remove identity.x509pop and identity.kubernetes")
	}
	if s.Linger.Duration < 0 {
		bad("identity.spire.linger", "%s is negative", s.Linger)
	}
	for field, of := range map[string][]SPIREEntry{"entries": s.Entries, "controlPlane": s.ControlPlane, "gateways": s.Gateways} {
		for n, e := range of {
			if _, err := onspire.ParseTemplate(e.Parent, e.Selectors); err != nil {
				bad(fmt.Sprintf("identity.spire.%s[%d]", field, n), "%v", err)
			}
		}
	}
}
