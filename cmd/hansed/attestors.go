package main

import (
	"cmp"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/hanse-mesh/hanse/identity/attest"
)

// attestors are the ways to attest that the configuration opens, besides tokens.
func attestors(cfg Identity, td spiffeid.TrustDomain) (map[string]attest.Attestor, error) {
	out := map[string]attest.Attestor{}
	if f := cfg.X509Pop.CAFile; f != "" {
		cas, err := readCAs(f)
		if err != nil {
			return nil, fmt.Errorf("identity.x509pop.caFile: %w", err)
		}
		out["x509pop"] = attest.NewX509Pop(td, cas, time.Now)
	}
	k := cfg.Kubernetes
	if k.Cluster == "" {
		return out, nil
	}
	if k.Server == "" {
		host, port := os.Getenv("KUBERNETES_SERVICE_HOST"), os.Getenv("KUBERNETES_SERVICE_PORT")
		if host == "" {
			return nil, errors.New("identity.kubernetes.server: missing, and this is no pod: give https://host:port of the API server")
		}
		k.Server = "https://" + net.JoinHostPort(host, cmp.Or(port, "443"))
	}
	api, err := attest.NewKubeAPI(k.Server, k.CAFile, k.TokenFile)
	if err != nil {
		return nil, fmt.Errorf("identity.kubernetes: %w", err)
	}
	out["hanse_pod"] = &attest.Pods{TrustDomain: td, Cluster: k.Cluster, Audience: k.Audience, Gateways: k.Gateways, Reviewer: api}
	if len(k.NodeAgents) > 0 {
		out["k8s_psat"] = &attest.NodeAgents{TrustDomain: td, Cluster: k.Cluster, Allowed: k.NodeAgents, Reviewer: api}
	}
	return out, nil
}

// readCAs reads the PEM certificates of a file; there must be one, and nothing else.
func readCAs(path string) ([]*x509.Certificate, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxConfigSize))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s: a PEM block %q, want CERTIFICATE", path, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: certificate %d: %w", path, len(out), err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s: no PEM certificate", path)
	}
	return out, nil
}
