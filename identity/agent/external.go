package agent

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/hanse-mesh/hanse/identity"
)

// meshHint marks, of several SVIDs that a process is entitled to, the mesh's: entries that hansed makes on SPIRE have it.
const meshHint = "hanse"

// followWorkloadAPI copies what another agent serves into the Source, until ctx ends. The client reconnects by itself.
func (a *Agent) followWorkloadAPI(ctx context.Context) error {
	c, err := workloadapi.New(ctx, workloadapi.WithAddr(a.cfg.WorkloadAPI))
	if err != nil {
		return fmt.Errorf("identity agent: Workload API %s: %w", a.cfg.WorkloadAPI, err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			a.log.Debug("close Workload API client", "error", err)
		}
	}()
	err = c.WatchX509Context(ctx, x509Watcher{a})
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("identity agent: Workload API %s: %w", a.cfg.WorkloadAPI, err)
}

// x509Watcher implements workloadapi.X509ContextWatcher.
type x509Watcher struct{ *Agent }

func (w x509Watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	svid := c.DefaultSVID()
	if i := slices.IndexFunc(c.SVIDs, func(s *x509svid.SVID) bool { return s.Hint == meshHint }); i >= 0 {
		svid = c.SVIDs[i]
	}
	bundles := map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	for _, b := range c.Bundles.Bundles() {
		bundles[b.TrustDomain()] = spiffebundle.FromX509Bundle(b)
	}
	w.src.Set(svid, bundles)
	w.metrics.renewals.WithLabelValues("x509").Inc()
	w.log.Info("X509-SVID received", "id", svid.ID.String(), "expires", svid.Certificates[0].NotAfter)
}

func (w x509Watcher) OnX509ContextWatchError(err error) {
	w.metrics.failures.WithLabelValues("workload_api").Inc()
	w.log.Warn("cannot follow the Workload API; the last identity stays in force", "address", w.cfg.WorkloadAPI, "error", err)
}

// TrustFollowed returns when the Source's bundles have exactly the authorities whose digests (identity.Digest) are given, for those trust
// domains that this workload federates with: a proxy may then acknowledge them. At least one sync interval passes, after which what is no
// longer trusted has gone from the Workload API too. It returns an error when ctx ends first.
func (a *Agent) TrustFollowed(ctx context.Context, authorities map[spiffeid.TrustDomain][]byte) error {
	interval := time.NewTimer(a.cfg.SyncInterval)
	defer interval.Stop()
	for passed := false; ; {
		changed := a.src.Changed()
		have := a.src.Bundles()
		var behind []string
		for td, want := range authorities {
			if b, ok := have[td]; ok && !bytes.Equal(identity.Digest(b.X509Authorities()), want) {
				behind = append(behind, td.Name())
			}
		}
		if passed && len(behind) == 0 {
			return nil
		}
		select {
		case <-changed:
		case <-interval.C:
			passed = true
		case <-ctx.Done():
			slices.Sort(behind)
			return fmt.Errorf("the Workload API has other authorities than announced for %v: %w", behind, ctx.Err())
		}
	}
}
