package agent

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net/url"
	"os"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/hanse-mesh/hanse/identity"
	"github.com/hanse-mesh/hanse/identity/atomicfile"
	"github.com/hanse-mesh/hanse/identity/spiretypes"
)

const (
	rpcTimeout   = 30 * time.Second
	renewTimeout = 5 * time.Second // of the agent's SVID: the workload's next one waits meanwhile
	maxEntries   = 10000           // that one agent reads
	maxToken     = 4096            // bytes of the token file
	maxTrust     = 1 << 20

	maxPodToken = 32 << 10
)

// step does everything that is due, once. The caller holds work.
func (a *Agent) step(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rpcTimeout)
	defer cancel()
	err := a.stepOnce(ctx)
	switch reason(err) {
	case types.PermissionDeniedDetails_AGENT_BANNED:
		return fmt.Errorf("%w: %w", ErrBanned, err)
	case types.PermissionDeniedDetails_AGENT_EXPIRED, types.PermissionDeniedDetails_AGENT_NOT_ATTESTED,
		types.PermissionDeniedDetails_AGENT_NOT_ACTIVE, types.PermissionDeniedDetails_AGENT_MUST_REATTEST:
		a.log.Warn("the server does not know this agent any more; attesting anew", "error", err)
		a.state.agent = nil
		a.dropClient(false)
		err = a.stepOnce(ctx)
	}
	if err == nil || errors.Is(err, errNotRenewed) {
		if err != nil {
			a.dropClient(true)
		}
		return err
	}
	if a.failed++; a.failed >= shutOutAfter && a.shutOut(err) {
		aerr := a.attestAnew(ctx)
		if aerr == nil {
			err = a.stepOnce(ctx)
		} else {
			err = fmt.Errorf("%w; attesting anew: %w", err, aerr)
		}
	}
	if err != nil {
		a.dropClient(true)
	}
	return err
}

// shutOutAfter is after how many failures in a row an agent may try to attest beside the SVID that it has.
const shutOutAfter = 3

// shutOut reports whether the server may have refused this agent's SVID in the handshake, where its root was revoked while they did not
// speak: that looks like a server that is away. It is worth asking where there is other evidence than what was used up: a pod's token, or
// another agent token.
func (a *Agent) shutOut(err error) bool {
	if status.Code(rootStatus(err)) != codes.Unavailable || !a.state.agent.valid(a.cfg.Now()) {
		return false
	}
	if a.cfg.PodToken != "" {
		return true
	}
	token, terr := a.token()
	return terr == nil && string(token) != a.spent
}

// attestAnew attests, and leaves what the agent has in force until that has succeeded.
func (a *Agent) attestAnew(ctx context.Context) error {
	if a.anew == nil {
		key, err := a.newKey()
		if err != nil {
			return err
		}
		a.anew = key
	}
	before := a.state.agent
	a.state.agent = &credential{key: a.anew}
	err := a.attest(ctx)
	if err != nil {
		a.state.agent = before
		return err
	}
	a.anew = nil
	a.log.Warn("the server did not accept this agent's SVID any more; attested anew", "agent", a.state.agent.id.String())
	return nil
}

// errNotRenewed is that all is in step, but the agent's own SVID is still the one that should have been renewed.
var errNotRenewed = errors.New("the agent's SVID is good still, but was not renewed")

// stepOnce looks after the workload first: what the server must write down, a new agent SVID, can wait for as long as the old one is valid, and with
// it the server's etcd.
func (a *Agent) stepOnce(ctx context.Context) error {
	now := a.cfg.Now()
	if !a.state.agent.valid(now) {
		if err := a.attest(ctx); err != nil {
			return err
		}
	}
	if err := a.sync(ctx); err != nil {
		return err
	}
	a.failed = 0
	if now.Before(a.state.agent.renewAt) {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	if err := a.renewAgent(ctx); err != nil {
		return fmt.Errorf("%w: %w", errNotRenewed, err)
	}
	return nil
}

// reason is why the server refused the agent.
func reason(err error) types.PermissionDeniedDetails_Reason {
	if err == nil {
		return types.PermissionDeniedDetails_UNKNOWN
	}
	for _, d := range status.Convert(rootStatus(err)).Details() {
		if d, ok := d.(*types.PermissionDeniedDetails); ok {
			return d.Reason
		}
	}
	return types.PermissionDeniedDetails_UNKNOWN
}

// maxRetryAfter bounds what a server may tell an agent to wait.
const maxRetryAfter = 5 * time.Minute

// retryAfter is when the server said to come back, with too many others before us (google.rpc.RetryInfo); 0: it did not.
func retryAfter(err error) time.Duration {
	for _, d := range status.Convert(rootStatus(err)).Details() {
		if d, ok := d.(*errdetails.RetryInfo); ok {
			return min(max(d.RetryDelay.AsDuration(), 0), maxRetryAfter)
		}
	}
	return 0
}

// rootStatus unwraps to the gRPC status, whose details wrapping would hide.
func rootStatus(err error) error {
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		return st.GRPCStatus().Err()
	}
	return err
}

// renewTime is half of what is left, give or take a tenth.
func renewTime(now, notAfter time.Time) time.Time {
	half := notAfter.Sub(now) / 2
	return now.Add(half + time.Duration((mathrand.Float64()-0.5)*0.2*float64(half)))
}

// csr asks for a certificate; with an ID it names it.
func csr(key *ecdsa.PrivateKey, id spiffeid.ID) ([]byte, error) {
	template := &x509.CertificateRequest{}
	if !id.IsZero() {
		template.URIs = []*url.URL{id.URL()}
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, template, key)
	if err != nil {
		return nil, fmt.Errorf("make CSR: %w", err)
	}
	return der, nil
}

// accept checks what a server signed: for our key, of the expected ID if there is one, verified by our own bundle.
func (a *Agent) accept(p *types.X509SVID, key *ecdsa.PrivateKey, want spiffeid.ID, own *spiffebundle.Bundle) (*credential, error) {
	chain, err := spiretypes.ToChain(p)
	if err != nil {
		return nil, err
	}
	now := a.cfg.Now()
	id, err := identity.Verify(chain, own, now)
	if err != nil {
		return nil, err
	}
	switch {
	case !id.MemberOf(a.cfg.TrustDomain), !want.IsZero() && id != want:
		return nil, fmt.Errorf("the server signed for %s, asked was %s", id, cmp.Or(want.String(), a.cfg.TrustDomain.IDString()))
	case !key.PublicKey.Equal(chain[0].PublicKey):
		return nil, errors.New("the server signed another key")
	}
	return &credential{key: key, id: id, chain: chain, renewAt: renewTime(now, chain[0].NotAfter)}, nil
}

// attest gets an agent SVID by the token, or the pod's. The key is kept first, so that a lost answer can be asked for again.
func (a *Agent) attest(ctx context.Context) error {
	trust, err := a.bootstrapBundle()
	if err != nil {
		return fmt.Errorf("attest: %w", err)
	}
	evidence, err := a.evidence()
	if err != nil {
		return fmt.Errorf("attest: %w", err)
	}
	if a.state.agent == nil || len(a.state.agent.chain) > 0 {
		key, err := a.newKey()
		if err != nil {
			return fmt.Errorf("attest: %w", err)
		}
		a.state.agent = &credential{key: key}
		if err := a.keep(); err != nil {
			return fmt.Errorf("attest: %w", err)
		}
	}
	key := a.state.agent.key
	der, err := csr(key, spiffeid.ID{})
	if err != nil {
		return fmt.Errorf("attest: %w", err)
	}
	a.dropClient(false)
	c, err := a.connect(trust, nil)
	if err != nil {
		return fmt.Errorf("attest: %w", err)
	}
	defer a.dropClient(false) // the next connection presents the agent's SVID
	stream, err := c.agents.AttestAgent(ctx)
	if err != nil {
		return fmt.Errorf("attest at %s: %w", c.addr, err)
	}
	err = stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   evidence,
		Params: &agentv1.AgentX509SVIDParams{Csr: der},
	}}})
	if err != nil && !errors.Is(err, io.EOF) { // EOF: Recv has the reason
		return fmt.Errorf("attest at %s: %w", c.addr, err)
	}
	resp, err := stream.Recv()
	if status.Code(err) == codes.InvalidArgument && a.cfg.PodToken == "" { // a pod's token is another one next time
		a.spent = string(evidence.Payload)
		return fmt.Errorf("attest at %s: %w: %w", c.addr, ErrTokenRefused, err)
	}
	if err != nil {
		return fmt.Errorf("attest at %s: %w", c.addr, err)
	}
	own, err := c.ownBundle(ctx, a.cfg.TrustDomain)
	if err != nil {
		return fmt.Errorf("attest at %s: %w", c.addr, err)
	}
	cred, err := a.accept(resp.GetResult().GetSvid(), key, spiffeid.ID{}, own)
	if err != nil {
		return fmt.Errorf("attest at %s: %w", c.addr, err)
	}
	a.state.agent, a.spent = cred, string(evidence.Payload)
	a.state.bundles = withBundle(a.state.bundles, own)
	if err := a.keep(); err != nil {
		return fmt.Errorf("attest: %w", err)
	}
	a.metrics.renewals.WithLabelValues("agent").Inc()
	a.log.Info("attested", "agent", cred.id.String(), "server", c.addr)
	return nil
}

func withBundle(m map[spiffeid.TrustDomain]*spiffebundle.Bundle, b *spiffebundle.Bundle) map[spiffeid.TrustDomain]*spiffebundle.Bundle {
	out := map[spiffeid.TrustDomain]*spiffebundle.Bundle{b.TrustDomain(): b}
	for td, x := range m {
		if td != b.TrustDomain() {
			out[td] = x
		}
	}
	return out
}

func (a *Agent) renewAgent(ctx context.Context) error {
	if a.cfg.PodToken != "" { // its agents attest again; meanwhile the old SVID is good
		before := a.state.agent
		err := a.attest(ctx)
		if err != nil && before.valid(a.cfg.Now()) {
			a.state.agent = before
		}
		return err
	}
	key, err := a.newKey()
	if err != nil {
		return fmt.Errorf("renew agent SVID: %w", err)
	}
	der, err := csr(key, spiffeid.ID{})
	if err != nil {
		return fmt.Errorf("renew agent SVID: %w", err)
	}
	c, err := a.mutual()
	if err != nil {
		return fmt.Errorf("renew agent SVID: %w", err)
	}
	resp, err := c.agents.RenewAgent(ctx, &agentv1.RenewAgentRequest{Params: &agentv1.AgentX509SVIDParams{Csr: der}})
	if err != nil {
		return fmt.Errorf("renew agent SVID at %s: %w", c.addr, err)
	}
	own, err := c.ownBundle(ctx, a.cfg.TrustDomain)
	if err != nil {
		return fmt.Errorf("renew agent SVID at %s: %w", c.addr, err)
	}
	cred, err := a.accept(resp.GetSvid(), key, a.state.agent.id, own)
	if err != nil {
		return fmt.Errorf("renew agent SVID at %s: %w", c.addr, err)
	}
	a.state.agent = cred
	if err := a.keep(); err != nil {
		return fmt.Errorf("renew agent SVID: %w", err)
	}
	a.dropClient(false) // the next connection presents the new one
	a.metrics.renewals.WithLabelValues("agent").Inc()
	return nil
}

// sync brings entry, bundles and SVID up to date, and publishes and keeps them if anything changed.
func (a *Agent) sync(ctx context.Context) error {
	begin := time.Now()
	c, err := a.mutual()
	if err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	entry, err := c.entry(ctx)
	if err != nil {
		return fmt.Errorf("sync with %s: %w", c.addr, err)
	}
	bundles, tainted, err := c.bundles(ctx, a.cfg.TrustDomain, entry.FederatesWith)
	if err != nil {
		return fmt.Errorf("sync with %s: %w", c.addr, err)
	}
	if tainted.signed(a.state.agent) { // before it is revoked, and this agent with it
		if err := a.renewAgent(ctx); err != nil {
			return err
		}
		if c, err = a.mutual(); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
	}
	id, err := spiretypes.ToID(entry.SpiffeId)
	if err != nil {
		return fmt.Errorf("sync with %s: entry %s: %w", c.addr, entry.Id, err)
	}
	own := bundles[a.cfg.TrustDomain]
	a.state.federates = entry.FederatesWith
	next := a.state
	next.bundles, next.entryID, next.revision = bundles, entry.Id, entry.RevisionNumber
	now := a.cfg.Now()
	due := !next.svid.valid(now) || !now.Before(next.svid.renewAt) || next.svid.id != id ||
		entry.Id != a.state.entryID || !trusted(next.svid, own) || tainted.signed(next.svid) || !slices.Equal(next.svid.chain[0].DNSNames, entry.DnsNames)
	if due {
		if next.svid, err = a.newSVID(ctx, c, entry.Id, id, own); err != nil {
			return fmt.Errorf("sync with %s: %w", c.addr, err)
		}
	}
	if !due && entry.RevisionNumber == a.state.revision && sameBundles(a.state.bundles, bundles) {
		return nil
	}
	if was := a.state.bundles[a.cfg.TrustDomain]; a.state.svid != nil && a.state.svid.id != id || was != nil && !was.JWTBundle().Equal(own.JWTBundle()) {
		a.jwts.drop() // of another ID, or by a key that is no more
	}
	if !c.believes(own, now) {
		defer a.dropClient(false) // the next connection is verified by the new bundle
	}
	a.state = next
	a.publish()
	if due {
		a.metrics.renewals.WithLabelValues("x509").Inc()
		a.log.Info("X509-SVID renewed", "id", id.String(), "expires", next.svid.chain[0].NotAfter, "server", c.addr, "took", time.Since(begin))
	}
	return a.keep()
}

// taints are the key IDs of the own authorities that are to be left.
type taints map[string]bool

// signed reports whether a tainted authority signed c.
func (t taints) signed(c *credential) bool {
	return c != nil && len(c.chain) > 0 && t[string(c.chain[len(c.chain)-1].AuthorityKeyId)]
}

// trusted reports whether the root that signed c is in the own bundle.
func trusted(c *credential, own *spiffebundle.Bundle) bool {
	last := c.chain[len(c.chain)-1]
	return slices.ContainsFunc(own.X509Authorities(), func(root *x509.Certificate) bool {
		return bytes.Equal(root.SubjectKeyId, last.AuthorityKeyId)
	})
}

func sameBundles(a, b map[spiffeid.TrustDomain]*spiffebundle.Bundle) bool {
	if len(a) != len(b) {
		return false
	}
	for td, x := range a {
		if y, ok := b[td]; !ok || !x.Equal(y) {
			return false
		}
	}
	return true
}

func (a *Agent) newSVID(ctx context.Context, c *client, entryID string, id spiffeid.ID, own *spiffebundle.Bundle) (*credential, error) {
	key, err := a.newKey()
	if err != nil {
		return nil, err
	}
	der, err := csr(key, id)
	if err != nil {
		return nil, err
	}
	resp, err := c.svids.BatchNewX509SVID(ctx, &svidv1.BatchNewX509SVIDRequest{Params: []*svidv1.NewX509SVIDParams{{EntryId: entryID, Csr: der}}})
	if err != nil {
		return nil, fmt.Errorf("get X509-SVID %s: %w", id, err)
	}
	if len(resp.Results) != 1 {
		return nil, fmt.Errorf("get X509-SVID %s: %d results, want 1", id, len(resp.Results))
	}
	r := resp.Results[0]
	if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
		return nil, fmt.Errorf("get X509-SVID %s: %w", id, status.Error(code, r.Status.Message))
	}
	cred, err := a.accept(r.Svid, key, id, own)
	if err != nil {
		return nil, fmt.Errorf("get X509-SVID %s: %w", id, err)
	}
	return cred, nil
}

// entry returns the oldest entry that the agent is authorized for.
func (c *client) entry(ctx context.Context) (*types.Entry, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := c.entries.SyncAuthorizedEntries(ctx)
	if err != nil {
		return nil, fmt.Errorf("get entries: %w", err)
	}
	mask := &types.EntryMask{SpiffeId: true, Selectors: true, FederatesWith: true, RevisionNumber: true, CreatedAt: true, DnsNames: true}
	if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{OutputMask: mask}); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("get entries: %w", err)
	}
	var entries []*types.Entry
	var ids []string
	for more := true; more; {
		resp, err := stream.Recv()
		if err != nil {
			return nil, fmt.Errorf("get entries: %w", err)
		}
		entries = append(entries, resp.Entries...)
		for _, r := range resp.EntryRevisions {
			ids = append(ids, r.Id)
		}
		if len(entries)+len(ids) > maxEntries {
			return nil, fmt.Errorf("get entries: more than %d", maxEntries)
		}
		more = resp.More
	}
	if len(ids) > 0 {
		if err := stream.Send(&entryv1.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("get entries: %w", err)
		}
		for more := true; more; {
			resp, err := stream.Recv()
			if err != nil {
				return nil, fmt.Errorf("get entries: %w", err)
			}
			entries = append(entries, resp.Entries...)
			more = resp.More && len(entries) <= maxEntries
		}
	}
	if len(entries) == 0 {
		return nil, errors.New("get entries: this agent is entitled to no identity; its token was for none, or its entry was deleted")
	}
	return slices.MinFunc(entries, func(a, b *types.Entry) int {
		return cmp.Or(cmp.Compare(a.CreatedAt, b.CreatedAt), cmp.Compare(a.Id, b.Id))
	}), nil
}

func (c *client) ownBundle(ctx context.Context, td spiffeid.TrustDomain) (*spiffebundle.Bundle, error) {
	b, _, err := c.taintedBundle(ctx, td)
	return b, err
}

// taintedBundle returns the own bundle, and which of its authorities are tainted.
func (c *client) taintedBundle(ctx context.Context, td spiffeid.TrustDomain) (*spiffebundle.Bundle, taints, error) {
	p, err := c.bundleAPI.GetBundle(ctx, &bundlev1.GetBundleRequest{})
	if err != nil {
		return nil, nil, fmt.Errorf("get bundle of %s: %w", td, err)
	}
	b, err := toBundle(p, td)
	if err != nil {
		return nil, nil, err
	}
	tainted := taints{}
	for _, a := range p.X509Authorities {
		if !a.Tainted {
			continue
		}
		if cert, err := x509.ParseCertificate(a.Asn1); err == nil { // toBundle has parsed it
			tainted[string(cert.SubjectKeyId)] = true
		}
	}
	return b, tainted, nil
}

// bundles returns the own bundle and those of the trust domains in names that the server has one of.
func (c *client) bundles(ctx context.Context, own spiffeid.TrustDomain, names []string) (map[spiffeid.TrustDomain]*spiffebundle.Bundle, taints, error) {
	out := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	b, tainted, err := c.taintedBundle(ctx, own)
	if err != nil {
		return nil, nil, err
	}
	out[own] = b
	for _, name := range names {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, nil, fmt.Errorf("get bundle of %q: %w", name, err)
		}
		p, err := c.bundleAPI.GetFederatedBundle(ctx, &bundlev1.GetFederatedBundleRequest{TrustDomain: td.Name()})
		if status.Code(err) == codes.NotFound {
			continue // a relation may exist before its bundle
		}
		if err != nil {
			return nil, nil, fmt.Errorf("get bundle of %s: %w", td, err)
		}
		if out[td], err = toBundle(p, td); err != nil {
			return nil, nil, err
		}
	}
	return out, tainted, nil
}

func toBundle(p *types.Bundle, td spiffeid.TrustDomain) (*spiffebundle.Bundle, error) {
	b, err := spiretypes.ToBundle(p)
	switch {
	case err != nil:
		return nil, fmt.Errorf("get bundle of %s: %w", td, err)
	case b.TrustDomain() != td:
		return nil, fmt.Errorf("get bundle of %s: the server sent that of %s", td, b.TrustDomain())
	case len(b.X509Authorities()) == 0:
		return nil, fmt.Errorf("get bundle of %s: it has no X.509 authority", td)
	}
	return b, nil
}

// bootstrapBundle is what to trust a server by before there is an SVID: the file, else what was learnt before.
func (a *Agent) bootstrapBundle() (*spiffebundle.Bundle, error) {
	if a.cfg.TrustBundle == "" {
		if b, ok := a.state.bundles[a.cfg.TrustDomain]; ok {
			return b, nil
		}
		return nil, errors.New("no trust bundle file is configured, so the server cannot be verified")
	}
	f, err := os.Open(a.cfg.TrustBundle)
	if err != nil {
		return nil, fmt.Errorf("trust bundle: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxTrust))
	if err != nil {
		return nil, fmt.Errorf("trust bundle %s: %w", a.cfg.TrustBundle, err)
	}
	b, err := parseTrust(a.cfg.TrustDomain, data)
	if err != nil {
		return nil, fmt.Errorf("trust bundle %s: %w", a.cfg.TrustBundle, err)
	}
	return b, nil
}

// parseTrust decodes PEM certificates or a SPIFFE bundle.
func parseTrust(td spiffeid.TrustDomain, data []byte) (*spiffebundle.Bundle, error) {
	if trimmed := bytes.TrimSpace(data); len(trimmed) > 0 && trimmed[0] == '{' {
		return spiffebundle.Parse(td, data)
	}
	b := spiffebundle.New(td)
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("a PEM block %q, want CERTIFICATE", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		b.AddX509Authority(cert)
	}
	if len(b.X509Authorities()) == 0 {
		return nil, errors.New("neither a SPIFFE bundle nor PEM certificates")
	}
	return b, nil
}

// evidence is what this agent attests with.
func (a *Agent) evidence() (*types.AttestationData, error) {
	if a.cfg.PodToken == "" {
		token, err := a.token()
		return &types.AttestationData{Type: "join_token", Payload: token}, err
	}
	f, err := os.Open(a.cfg.PodToken) // the kubelet's modes, not ours
	if err != nil {
		return nil, fmt.Errorf("pod token: %w", err)
	}
	defer f.Close()
	token, err := io.ReadAll(io.LimitReader(f, maxPodToken))
	if err != nil {
		return nil, fmt.Errorf("pod token %s: %w", a.cfg.PodToken, err)
	}
	payload, err := json.Marshal(map[string]string{"cluster": a.cfg.PodCluster, "token": string(bytes.TrimSpace(token))})
	if err != nil {
		return nil, fmt.Errorf("pod token %s: %w", a.cfg.PodToken, err)
	}
	return &types.AttestationData{Type: "hanse_pod", Payload: payload}, nil
}

func (a *Agent) token() ([]byte, error) {
	if a.cfg.TokenFile == "" {
		return nil, errors.New("this agent has to attest, and no token file is configured")
	}
	data, err := atomicfile.Read(a.cfg.TokenFile, maxToken)
	if err != nil {
		return nil, fmt.Errorf("agent token: %w", err)
	}
	token := bytes.TrimSpace(data)
	if len(token) == 0 {
		return nil, fmt.Errorf("agent token: %s is empty", a.cfg.TokenFile)
	}
	return token, nil
}
