package attest

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

// KubeAPI is a TokenReviewer that speaks to an API server with a service account's token, which it reads anew each time:
// the kubelet replaces it. Its account needs the ClusterRole system:auth-delegator.
type KubeAPI struct {
	url       string
	tokenFile string
	client    *http.Client
}

const (
	inCluster     = "/var/run/secrets/kubernetes.io/serviceaccount/"
	reviewTimeout = 10 * time.Second
	maxReview     = 1 << 20 // bytes of an answer
)

// NewKubeAPI returns one for the API server at url (https://host:port), which must present a certificate by a CA in caFile.
// Empty file names are those of a pod.
func NewKubeAPI(url, caFile, tokenFile string) (*KubeAPI, error) {
	if caFile == "" {
		caFile = inCluster + "ca.crt"
	}
	if tokenFile == "" {
		tokenFile = inCluster + "token"
	}
	if !strings.HasPrefix(url, "https://") {
		return nil, fmt.Errorf("API server %q: want https://host:port", url)
	}
	pem, err := readBounded(caFile)
	if err != nil {
		return nil, fmt.Errorf("CA of API server %s: %w", url, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("CA of API server %s: %s holds no PEM certificate", url, caFile)
	}
	return &KubeAPI{url: strings.TrimSuffix(url, "/") + "/apis/authentication.k8s.io/v1/tokenreviews", tokenFile: tokenFile, client: &http.Client{
		Timeout: reviewTimeout,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool, SessionTicketsDisabled: true}, TLSHandshakeTimeout: reviewTimeout,
			MaxIdleConns: 4, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("the API server redirects") },
	}}, nil
}

// tokenReview is authentication.k8s.io/v1 TokenReview, as far as it matters here.
type tokenReview struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	Spec       struct {
		Token     string   `json:"token"`
		Audiences []string `json:"audiences"`
	} `json:"spec"`
	Status struct {
		Authenticated bool     `json:"authenticated"`
		Audiences     []string `json:"audiences"`
		Error         string   `json:"error"`
		User          struct {
			Username string              `json:"username"`
			Extra    map[string][]string `json:"extra"`
		} `json:"user"`
	} `json:"status"`
}

// ReviewToken implements TokenReviewer.
func (k *KubeAPI) ReviewToken(ctx context.Context, token string, audiences []string) (Review, error) {
	own, err := readBounded(k.tokenFile)
	if err != nil {
		return Review{}, fmt.Errorf("own token: %w", err)
	}
	tr := tokenReview{APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview"}
	tr.Spec.Token, tr.Spec.Audiences = token, audiences
	body, err := json.Marshal(tr)
	if err != nil {
		return Review{}, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, k.url, bytes.NewReader(body))
	if err != nil {
		return Review{}, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+string(bytes.TrimSpace(own)))
	resp, err := k.client.Do(req)
	if err != nil {
		return Review{}, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxReview))
	if err != nil {
		return Review{}, err
	}
	if resp.StatusCode != http.StatusCreated && resp.StatusCode != http.StatusOK {
		return Review{}, fmt.Errorf("the API server answers %s to a TokenReview; does this account have ClusterRole system:auth-delegator?", resp.Status)
	}
	var out tokenReview
	if err := json.Unmarshal(data, &out); err != nil {
		return Review{}, fmt.Errorf("decode TokenReview: %w", err)
	}
	return Review{Authenticated: out.Status.Authenticated, Audiences: out.Status.Audiences, Username: out.Status.User.Username,
		Extra: out.Status.User.Extra, Error: out.Status.Error}, nil
}

// readBounded reads a file that the kubelet writes, and others may read.
func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxReview))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return data, nil
}
